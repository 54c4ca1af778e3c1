"""Arrays computed once and kept on disk: filled row by row, found again by key, continued after a kill."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compress.context import Task
from compress.process import only_writer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def found(folder: Path, key: str) -> np.ndarray | None:
    """The array `key`, if it is whole."""
    path = folder / f"{key}.npy"
    return np.load(path, mmap_mode="r") if path.exists() else None


def stored(
    folder: Path, key: str, shape: tuple[int, ...], dtype: str, rows: int, fill: Callable[[int, int], np.ndarray],
    task: Task | None = None,
) -> np.ndarray:
    """The array `key` (a memory map, read only), made by `fill(start, stop)` over blocks of `rows` where it is not whole yet.

    A block is flushed before it is counted as done, and the file takes its final name when the last one is. Of several processes that
    want it, one makes it and the others wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{key}.npy"
    if not whole.exists():
        with only_writer(folder / f"{key}.writer", lambda process: None):
            make(folder, key, shape, dtype, rows, fill, task or Task(key, shape[0], lambda task: None))
    return np.load(whole, mmap_mode="r")


def make(
    folder: Path, key: str, shape: tuple[int, ...], dtype: str, rows: int, fill: Callable[[int, int], np.ndarray], task: Task
) -> None:
    whole, partial, state = folder / f"{key}.npy", folder / f"{key}.partial", folder / f"{key}.json"
    if not whole.exists():
        done = 0
        if partial.exists() and state.exists():
            done = json.loads(state.read_text())["rows"]
            array = np.lib.format.open_memmap(partial, mode="r+")
        else:
            state.unlink(missing_ok=True)  # of an array that was whole and is gone
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        allocate(partial)
        task.resume(done)
        for start in range(done, shape[0], rows):
            stop = min(start + rows, shape[0])
            array[start:stop] = fill(start, stop)
            array.flush()
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps({"rows": stop}))
            temporary.replace(state)
            task.advance(stop - start)
        del array
        partial.replace(whole)
        state.unlink(missing_ok=True)


def allocate(path: Path) -> None:
    """Has the disk set aside all bytes of a file: a memory map that finds it full as it is written ends the process (SIGBUS). OSError where
    there is no room, and no file then."""
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in FULL:  # other errors are of file systems that cannot do this
            path.unlink()
            raise OSError(error.errno, f"{error.strerror}: {size / 1e9:.3g} GB are needed", str(path)) from None
