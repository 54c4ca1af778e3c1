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
with bounded(float(sys.argv[1])):
    small = [bytes(b"x" * 2**20) for _ in range(600)]
    del small[::2]  # holes that nothing larger fits into
    large = [bytes(b"x" * 3 * 2**20) for _ in range(250)]
    time.sleep(1)
    print(resident() / 2**20)
"""


def resident_at_last(most: float) -> float:
    """MiB that are resident when 1,050 are in use, after 300 more were freed between them."""
    done = subprocess.run([sys.executable, "-c", CODE, str(most), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_freed_blocks_are_kept_below_the_bound():
    assert resident_at_last(2**40) > 1300


def test_freed_blocks_are_given_back_above_it():
    assert resident_at_last(300 * 2**20) < 1150
