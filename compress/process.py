"""What belongs to the operating system's process: one writer at a time, the threads it may use, the memory it has held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from compress.errors import StageError


@contextlib.contextmanager
def only_writer(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Holds `path` locked, with this process's number in it. If another holds it, calls `busy(its number)`, then waits.

    A POSIX record lock: it ends with the process however that dies, and children do not inherit it.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StageError(f"cannot write {path} ({error.strerror})") from None
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                busy(os.pread(descriptor, 32, 0).decode().strip() or "(unknown)")
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):  # else its holder removed it while this process waited
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def thread_count() -> int:
    """OMP_NUM_THREADS if it is set, else the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forget_peak() -> None:
    """From now on `peak` is of what comes. Only Linux can; elsewhere it stays that of the whole process."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    """The most bytes of this process that were in memory at once since `forget_peak`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
