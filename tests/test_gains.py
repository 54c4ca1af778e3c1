"""benchmarks/gains.py: gains over the stages that rows are compared with, seeds together."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compress import ledger, recipe

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gains.py"
STAGES = """name: x
student: {preset: tiny}
stages:
  - concepts: {as: extractor}
  - train: {as: plain, preset: tiny}
  - train: {as: plain-18, seed: 18, preset: tiny}
  - train: {as: better, preset: tiny, against: plain}
  - train: {as: better-18, seed: 18, preset: tiny, against: plain-18}
  - train: {as: better-2, from: better}
"""
CIDER = {"plain": 40.0, "plain-18": 42.0, "better": 45.0, "better-18": 44.0, "better-2": 46.0}


def printed(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "x.yaml").write_text(STAGES)
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml(recipe.read_recipe(tmp_path / "x.yaml")))
    noise = np.random.default_rng(0).normal(0, 30, 200)
    rows = [{"stage": "concepts", "name": "extractor", "artifact": "extractor"}]
    for number, (name, cider) in enumerate(CIDER.items()):
        (tmp_path / name).mkdir()
        values = cider + noise + np.random.default_rng(number + 1).normal(0, 2, 200)
        values += cider - values.mean()
        wording = {"plain-18": 50, "better": 100}.get(name, 0)  # so many captions in words of its own
        said = [{"image": f"{i}.jpg", "caption": name if i < wording else "a dog", "cider": value} for i, value in enumerate(values)]
        (tmp_path / name / "captions.val.json").write_text(json.dumps(said[::-1] if number % 2 else said))
        row = {"stage": "train", "name": name, "artifact": name, "split": "val", "cider": cider}
        rows.append(row | {"gmacs_caption": 1.5, "params": 2e6, "seconds": 10.0})
    ledger.write(tmp_path / "ledger.jsonl", rows)
    return tmp_path


def test_gains_of_seeds_together(run):
    """`better-2` goes on from `better`: its name does not make it a seed of it."""
    done = printed(str(run), "--json")
    assert done.returncode == 0, done.stderr
    plain, better, more = json.loads(done.stdout)["rows"]
    assert (plain["name"], plain["against"], plain["seeds"], plain["gain"], plain["cider"]) == ("plain", None, 2, None, pytest.approx(41.0))
    assert (better["name"], better["against"], better["seeds"], better["against_seeds"]) == ("better", "plain", 2, 2)
    assert better["gain_by_seed"] == pytest.approx([5.0, 2.0]) and better["gain"] == pytest.approx(3.5)
    assert better["cider"] == pytest.approx(44.5) and better["seconds"] == 20.0
    assert (more["name"], more["against"], more["seeds"], more["gain"]) == ("better-2", "better", 1, pytest.approx(1.0))
    assert (plain["same"], better["same"], more["same"]) == (None, pytest.approx(0.625), 0.5)  # 100 and 150 of 200
    assert (plain["seeds_alike"], better["seeds_alike"], more["seeds_alike"]) == (0.75, 0.5, None)
    low, high = better["gain_ci95"]
    assert low < better["gain"] < high and high - low < 2  # images are paired: their own spread of 30 is not in it


def test_a_table(run):
    lines = printed(str(run)).stdout.splitlines()
    assert lines[0].startswith("| stage | compared with | seeds | CIDEr | gain |") and len(lines) == 5
    assert lines[2] == "| plain |  | 2 | 41.0 |  |  |  | 75% | 1.500 | 2.00M | 20 |"
    assert "| +5.0, +2.0 | 62% | 50% | 1.500 | 2.00M | 20 |" in lines[3]


def test_no_run_is_one_line(tmp_path):
    done = printed(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("gains.py: ") and done.stderr.count("\n") == 1
