"""Peak resident memory and cold start of an exported captioner: `python caption.py PHOTO` from the start of the process to its caption.

    python benchmarks/memory.py [--runs 9] [--folder EXPORT...] [--keep FOLDER] [--python PYTHON]

Without --folder it builds LightCap-40M in INT8 (random weights: no checkpoint of it can be had) and measures its export beside the fp32
one. Runs of all cases alternate. README.md says what each number is. The last line is one JSON document; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("int8-export", "onnx")
IMPORTS = "import numpy, PIL.Image, tokenizers, onnxruntime"
SIZES = {"photo": (640, 480), "large": (4000, 3000)}  # width, height: a photo of the usual data sets, and a phone's of 12 megapixels
ALONE = "--alone"  # the first argument of the small process that measures
PAPER_MB = 257  # LightCap's memory on a phone, as the paper gives it
BUILD = (
    "import sys; sys.path[:0] = sys.argv[1:3]; import models; from pathlib import Path; "
    "[print(models.build(name, Path(sys.argv[3]), int(sys.argv[4])).path) for name in sys.argv[5:]]"
)
PAINT = (
    "import sys; import numpy; from PIL import Image; width, height = map(int, sys.argv[2:]); "
    "coarse = numpy.random.default_rng(17).integers(0, 256, (height // 40, width // 40, 3), dtype=numpy.uint8); "
    "Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sys.argv[1], quality=92)"
)


@dataclass(frozen=True)
class Case:
    """A command, and the files of its model, which are put out of the page cache before a cold run."""

    name: str
    command: tuple[str, ...]
    folder: Path | None = None


@dataclass(frozen=True)
class Run:
    """`first_s`: seconds until the first byte of output; `peak_mb`: the process's largest resident set, 10^6 bytes; `cpu_s`: of all its
    threads."""

    first_s: float
    peak_mb: float
    cpu_s: float


def run(command: tuple[str, ...]) -> Run:
    """Runs `command` as the child of a small process. RuntimeError, with what it said, where it fails.

    The kernel counts what a process was before it became another program: a large parent would be its child's peak.
    """
    done = subprocess.run([sys.executable, "-I", __file__, ALONE, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return Run(**json.loads(done.stdout))


def alone(command: list[str]) -> Run:
    """What `run` has measured in the small process; its own exit status is the command's."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the caption is seen when it is written, not when the process ends
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    scale = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss: bytes there, KiB here
    return Run(seconds, used.ru_maxrss * scale / 1e6, used.ru_utime + used.ru_stime)


def forget(folder: Path) -> bool:
    """Puts the files of `folder` out of the page cache, as after a boot; False where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    return True


def measure(cases: list[Case], runs: int) -> list[dict]:
    """A row per case; `runs` turns of all cases, each warm and, where it has a folder, with the model's files read from disk again."""
    warm: dict[str, list[Run]] = {case.name: [] for case in cases}
    cold: dict[str, list[Run]] = {case.name: [] for case in cases}
    for turn in range(-1, runs):
        for case in cases:
            found = run(case.command)
            if turn >= 0:
                warm[case.name].append(found)
                if case.folder is not None and forget(case.folder):
                    cold[case.name].append(run(case.command))
        print(f"turn {turn + 1} of {runs}", file=sys.stderr, flush=True)
    return [row(case, warm[case.name], cold[case.name]) for case in cases]


def row(case: Case, warm: list[Run], cold: list[Run]) -> dict:
    low, middle, high = statistics.quantiles((one.first_s for one in warm), n=4)
    found = {"cold_start_s": middle, "cold_start_s_q1": low, "cold_start_s_q3": high, "cpu_s": statistics.median(one.cpu_s for one in warm)}
    found |= {"cold_start_from_disk_s": statistics.median(one.first_s for one in cold)} if cold else {}
    found |= {"peak_mb": statistics.median(one.peak_mb for one in warm), "peak_mb_max": max(one.peak_mb for one in warm + cold)}
    size = sum(path.stat().st_size for path in case.folder.iterdir() if path.is_file()) if case.folder else None
    return {"name": case.name, "folder_bytes": size} | {key: round(value, 3) for key, value in found.items()}


def cases(python: str, folders: dict[str, Path], photos: dict[str, Path]) -> list[Case]:
    found = [Case("imports alone", (python, "-c", f"{IMPORTS}; print()"))]
    for name, folder in folders.items():
        script = (python, str(folder / "caption.py"), "--threads", "1")
        found += [Case(f"{name}, {size}", (*script, str(photo)), folder) for size, photo in photos.items()]
        found.append(Case(f"{name}, beam 5", (*script, "--beam", "5", str(photos["photo"])), folder))
    return found


def line(row: dict) -> str:
    disk = f" ({row['cold_start_from_disk_s']:.2f} from disk)" if "cold_start_from_disk_s" in row else ""
    return f"{row['name']:22} {row['cold_start_s']:6.2f} s to the first caption{disk}   peak {row['peak_mb']:6.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path, nargs="+", help="exported captioners to measure instead, of different names")
    parser.add_argument("--keep", type=Path, help="a folder where the models that are built stay, and are taken from next time")
    parser.add_argument("--images", type=int, default=64, help="generated pictures for calibration")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the export's requirements.txt")
    options = parser.parse_args()
    if options.runs < 2:
        parser.error("--runs must be at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder:
            folders = {folder.name: folder for folder in options.folder}
        else:
            kept = options.keep or Path(scratch)
            arguments = [str(HERE), str(HERE.parent), str(kept), str(options.images), *MODELS]
            made = subprocess.run([sys.executable, "-c", BUILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
            folders = dict(zip(MODELS, map(Path, made.stdout.splitlines()[-len(MODELS) :]), strict=True))
        photos = {name: Path(scratch) / f"{name}.jpg" for name in SIZES}
        for name, (width, height) in SIZES.items():
            subprocess.run([sys.executable, "-c", PAINT, str(photos[name]), str(width), str(height)], check=True)
        rows = measure(cases(options.python, folders, photos), options.runs)
    for found in rows:
        print(line(found))
    peaks = {found["name"]: found["peak_mb"] for found in rows}
    ratios = {f"paper / {name}": round(PAPER_MB / peaks[f"{name}, photo"], 2) for name in folders}
    print(json.dumps({"threads": 1, "runs": options.runs, "paper_mb": PAPER_MB, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    if sys.argv[1:2] == [ALONE]:
        print(json.dumps(dataclasses.asdict(alone(sys.argv[2:]))))
    else:
        main()
