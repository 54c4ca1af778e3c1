"""The shipped quickstart, shrunk, killed with SIGKILL at five moments and started again, ends with an undisturbed run's digests."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import ledger
from compress.artifact import Artifact

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SETS = (
    "data.train_images=600", "data.val_images=60", "teacher.epochs=4", "student.epochs=4", "pruned.recover_epochs=3",
    "pruned.max_drop_cider=1000", "int8.max_drop_cider=1000", "int8.calibration_images=64",
)
MEASURED = ("seconds", "peak_mb", "latency_ms", "parent_latency_ms")  # what differs from one run to the next
EACH_SECONDS = 0.3  # how often resume state is written here: a stage of this size lasts seconds
STEPS = 10  # of the 57 or more that each training here has
# The command itself, with resume state written often: a value set from outside, so that no module's text, and no lock, is another.
COMMAND = f"""
from compress.training import loop
loop.SAVE_SECONDS = {EACH_SECONDS}
loop.SAVE_SHARE = 1.0
from compress.cli import main
main()
"""


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, *words, "quickstart", *(part for value in SETS for part in ("--set", value))]


def run(folder: Path) -> None:
    """Runs the recipe to its end in `folder`."""
    done = subprocess.run(command("run"), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def locks(folder: Path) -> dict[str, str]:
    """Stage name -> lock."""
    done = subprocess.run([*command("plan"), "--json"], cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    return {stage["name"]: stage["lock"] for stage in json.loads(done.stdout)["stages"]}


def kill_when(folder: Path, reached, log: Path, seconds: float = 600) -> None:
    """Starts the command and kills it as soon as `reached()` is true. AssertionError if it ends, or takes longer, before that."""
    with log.open("w") as stream:
        process = subprocess.Popen(command("run"), cwd=folder, env=environment(), stdout=stream, stderr=stream)
        try:
            latest = time.monotonic() + seconds
            while not reached():
                assert process.poll() is None, f"it ended before the moment came: {log.read_text()[-3000:]}"
                assert time.monotonic() < latest, f"the moment did not come: {log.read_text()[-3000:]}"
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL


def step_of(state: Path) -> int:
    """The number of steps that a resume file holds."""
    with state.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return int(json.loads(file.read(length))["__metadata__"]["step"])


class Training:
    """A moment inside `fit`: resume state of at least STEPS steps is there."""

    def __init__(self, work: Path, label: str) -> None:
        self.label = label
        self.state = work / "state" / (label.replace(" ", "-").replace("/", "-of-") + ".safetensors")

    def __call__(self) -> bool:
        return self.state.exists() and step_of(self.state) >= STEPS


def quantizing(work: Path):
    """A second after the stage began to write its artifact."""
    began = []

    def reached() -> bool:
        if not began and any(work.glob(".model.writing-*")):
            began.append(time.monotonic())
        return bool(began) and time.monotonic() - began[0] > 1.0

    return reached


@pytest.mark.timeout(2400)
def test_killed_five_times_it_ends_as_the_undisturbed_run(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    lock = locks(killed)
    cache = killed / "runs" / ".cache"
    work = {name: cache / f"{digest}.work" for name, digest in lock.items()}
    labels = {"teacher": "teacher", "student": "student", "pruned": "pruned 1/1 fusion"}
    training = {name: Training(work[name], label) for name, label in labels.items()}
    moments = {
        "in teacher's training": ("teacher", training["teacher"]),
        "in distillation": ("student", training["student"]),
        "while the student is measured": ("student", (work["student"] / "model").is_dir),
        "in prune's recovery": ("pruned", training["pruned"]),
        "in quantize": ("int8", quantizing(work["int8"])),
    }
    for moment, (name, reached) in moments.items():
        kill_when(killed, reached, tmp_path / "log.txt")
        assert not (cache / lock[name]).exists(), moment  # whole, or not under its name
        if isinstance(reached, Training):
            lines = (tmp_path / "log.txt").read_text().splitlines()
            assert not [line for line in lines if line.startswith(f"{reached.label}: ") and ", done in " in line], moment
    run(killed)
    run(calm)

    rows, expected = (ledger.read_run(folder / "runs" / "quickstart") for folder in (killed, calm))
    assert [row["name"] for row in rows] == ["nearest", *lock]
    for row, undisturbed in zip(rows, expected, strict=True):
        assert {key: value for key, value in row.items() if key not in MEASURED} == {
            key: value for key, value in undisturbed.items() if key not in MEASURED
        }
        if row["stage"] != "baseline":
            made, wanted = (Artifact(folder / "runs" / "quickstart" / row["artifact"]).check() for folder in (killed, calm))
            assert made.digest() == wanted.digest(), row["name"]
            assert row["lock"] == lock[row["name"]]
    assert not [path.name for path in cache.iterdir() if path.suffix in (".work", ".writer")]
