"""Freed memory: kept by the process while it trains, and given back to the system before it piles up.

By default glibc maps each large tensor anew, and the kernel clears its pages in every training step. Kept blocks need no clearing; but
batches of ever other lengths cut the heap up, and what is kept would grow to several times what is used. Elsewhere than on Linux with glibc
nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's mallopt
MOST_RESIDENT = 5.2 * 2**30  # bytes, mapped files among them
GROWTH = 0.5 * 2**30  # what must have been added since the last time
PAUSE = 60.0  # seconds: near the bound, training takes again within seconds what was given back, page by page
SECONDS = 0.1


def keep() -> None:
    """From now on freed blocks stay with the process."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def bounded(most: float = MOST_RESIDENT, pause: float = PAUSE) -> Iterator[None]:
    """While it lasts, a thread looks ten times a second, and gives freed blocks back (malloc_trim) when more than `most` bytes are
    resident: every `pause` seconds at most, unless another `most` came in between. What is in use stays, however much it is."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        resident()
    except (OSError, AttributeError):
        yield
        return
    last, given = 0, -math.inf

    def look() -> None:
        nonlocal last, given
        now = resident()
        rested = time.monotonic() - given >= pause
        if now > max(most, last + GROWTH) and (rested or now > last + most):
            trim(0)
            last, given = resident(), time.monotonic()
        last = min(last, now)

    with watching(look, SECONDS):
        yield


@contextlib.contextmanager
def watching(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """While it lasts, a thread calls `look` every `seconds`."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
