"""Freed memory stays with the process, up to a bound."""

import subprocess
import sys
from pathlib import Path

import compress

ROOT = Path(compress.__file__).resolve().parent.parent
CODE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from compress.memory import bounded, keep, resident
keep()
with bounded(float(sys.argv[1]), float(sys.argv[3])):
    before = bytes(b"x" * int(sys.argv[4]) * 2**20)
    time.sleep(0.5)
    small = [bytes(b"x" * 2**20) for _ in range(600)]
    del small[::2]  # holes that nothing larger fits into
    large = [bytes(b"x" * 3 * 2**20) for _ in range(250)]
    time.sleep(1)
    print(resident() / 2**20)
"""


def resident_at_last(most: float, pause: float = 0, before: int = 0) -> float:
    """MiB that are resident when `before` and 1,050 are in use, after 300 more were freed between these."""
    arguments = [str(argument) for argument in (most, ROOT, pause, before)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_freed_blocks_are_kept_below_the_bound():
    assert resident_at_last(2**40) > 1300


def test_freed_blocks_are_given_back_above_it():
    assert resident_at_last(300 * 2**20) < 1150


def test_they_are_given_back_once_in_a_pause():
    """What came behind `before` is less than another bound."""
    assert resident_at_last(1400 * 2**20, pause=600, before=1500) > 2800
    assert resident_at_last(1400 * 2**20, before=1500) < 2650


def test_another_bound_is_given_back_at_once():
    assert resident_at_last(300 * 2**20, pause=600) < 1300
