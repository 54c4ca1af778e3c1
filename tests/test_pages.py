"""Huge pages for the heap: counted in page faults of a process of its own, and nothing where there are none."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import compress
from compress import pages

ROOT = Path(compress.__file__).resolve().parent.parent
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CYCLES = """
import ctypes, resource, time, torch
from compress import memory, pages
memory.keep()
trim = ctypes.CDLL("libc.so.6").malloc_trim

def taken():
    return [torch.ones(1_000_000) for _ in range(50)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = taken()
    del blocks
    trim(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

blocks = taken()
above = torch.ones(1_000_000)  # the heap does not shrink: what is given back lies in its middle, as in training
del blocks
trim(0)
plain = faults()
with pages.huge_pages():
    time.sleep(2)
    print(plain, faults())
"""


def test_a_heap_that_is_given_back_is_faulted_in_by_huge_pages():
    """Where the kernel gives none, asking for them changes nothing."""
    done = subprocess.run([sys.executable, "-c", CYCLES], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    plain, asked = map(int, done.stdout.split())
    if SETTING.is_file() and "[madvise]" in SETTING.read_text():
        assert plain > 40_000  # 200 MB in pages of 4 KiB
        assert asked < plain / 4
    else:
        assert asked < 1.1 * plain + 1000


def test_the_heap_is_whole_huge_pages(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    monkeypatch.setattr(pages, "MAPS", maps)
    assert pages.heap() is None  # no such file
    maps.write_text("00400000-00401000 r--p 00000000 fe:00 1 /bin/python\n01000fff-01a01000 rw-p 00000000 00:00 0 [heap]\n"
                    "01a01000-02200000 rw-p 00000000 00:00 0 [heap]\n")
    assert pages.heap() == (0x1200000, 0x2200000)
    maps.write_text("01000000-01001000 rw-p 00000000 00:00 0 [heap]\n")
    assert pages.heap() is None


def test_without_the_call_nothing_happens(monkeypatch):
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    monkeypatch.setattr(pages, "heap", lambda: pytest.fail("nobody is to look"))
    before = threading.active_count()
    with pages.huge_pages():
        assert threading.active_count() == before
