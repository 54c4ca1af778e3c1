"""Huge pages for the heap, while a run lasts.

Training takes and frees gigabytes in every few steps, and what was given back (compress/memory.py) is faulted in again, 4 KiB at a time:
a quarter million faults for each gigabyte. In pages of 2 MiB there are next to none. glibc would ask for them only if GLIBC_TUNABLES had
said so before the process began. Elsewhere than on Linux, and where the kernel has no such pages, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from compress.memory import watching

MADV_HUGEPAGE = 14
HUGE = 2 * 2**20
SECONDS = 0.2
MAPS = Path("/proc/self/maps")


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """While it lasts, a thread asks for huge pages wherever the heap has grown to."""
    madvise = _madvise()
    if madvise is None or not MAPS.is_file():
        yield
        return

    def look() -> None:
        if (found := heap()) is not None:  # again and again: what a heap grows by is a mapping of its own, of which nothing was asked
            madvise(found[0], found[1] - found[0], MADV_HUGEPAGE)

    with watching(look, SECONDS):
        yield


def heap() -> tuple[int, int] | None:
    """First and last address of the heap, in whole huge pages; None where the system does not say, or it is smaller than one."""
    try:
        lines = [line for line in MAPS.read_text().splitlines() if line.endswith("[heap]")]
    except OSError:
        return None
    places = [tuple(int(side, 16) for side in line.split(" ", 1)[0].split("-")) for line in lines]
    if not places:
        return None
    start, stop = -(-min(places)[0] // HUGE) * HUGE, max(places)[1] // HUGE * HUGE
    return (start, stop) if start < stop else None


def _madvise():
    try:
        function = ctypes.CDLL("libc.so.6").madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
