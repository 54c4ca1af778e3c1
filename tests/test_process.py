"""The most memory that a process has held, since it was last asked to forget."""

import subprocess
import sys
from pathlib import Path

import compress

ROOT = Path(compress.__file__).resolve().parent.parent
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from compress.process import forget_peak, peak
large = bytes(b"x" * 400 * 2**20)
before = peak()
del large
forget_peak()
small = bytes(b"x" * 50 * 2**20)
print(before / 2**20, peak() / 2**20)
"""


def test_a_peak_is_forgotten():
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert before > 400 and 50 < after < 200
