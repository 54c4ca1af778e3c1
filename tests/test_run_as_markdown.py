"""benchmarks/results.py: a run's ledger and captions as Markdown."""

import json
import subprocess
import sys
from pathlib import Path

from compress import ledger

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "results.py"


def printed(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


def test_the_ledger_and_captions_chosen_by_number(tmp_path):
    rows = [{"stage": "baseline", "name": "nearest", "artifact": "near", "cider": 24.24, "cider_ci95": [20.0, 28.06]}]
    for name in ("teacher", "teacher-2", "student", "int8"):
        folder = tmp_path / name
        folder.mkdir()
        images = [{"image": f"{number}.jpg", "caption": f"{name} sees | {number}"} for number in range(26)]
        (folder / "captions.val.json").write_text(json.dumps(images))
        row = {"stage": "train", "name": name, "artifact": name, "split": "val", "cider": 50.0, "params": 23_527_264, "bytes": 8_710_000}
        row |= {"delta_cider": -1.25, "delta_ci95": [-3.0, 0.5], "params_by_part": {"encoder": 1, "layers": 4_568_736}}
        row |= {"latency_ms": {"p50": 6.64, "runtime": "onnxruntime"}}
        rows.append(row)
    ledger.write(tmp_path / "ledger.jsonl", rows)
    done = printed(str(tmp_path), "--images", "12")
    assert done.returncode == 0, done.stderr
    table, captions = (part.splitlines() for part in done.stdout.strip().split("\n\n"))
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(rows)
    assert table[2].startswith("| nearest | 24.2 [20.0, 28.1] |  |")
    for cell in ("| 50.0 |", "| -1.2 [-3.0, +0.5] |", "| 23.53M | 4.57M |", "| 8.71 |", "| 6.6 |", "| onnxruntime |"):
        assert cell in table[3]
    assert captions[0] == "| image | teacher | student | int8 |"
    assert [line.split()[1] for line in captions[2:]] == [f"{2 * turn}:" for turn in range(12)]  # every floor(26 / 12)-th
    assert captions[3] == "| 2: 2.jpg | teacher sees \\| 2 | student sees \\| 2 | int8 sees \\| 2 |"
    (tmp_path / "student" / "captions.val.json").unlink()  # as where runs/.cache was removed
    done = printed(str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "what 'student' said is gone" in done.stderr


def test_no_run_is_one_line(tmp_path):
    done = printed(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"results.py: {tmp_path} is not a run: it has no ledger.jsonl; `lightcap run RECIPE` makes one\n"
