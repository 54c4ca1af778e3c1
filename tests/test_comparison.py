"""Runs side by side. Rows of one name in several runs: their difference is the mean over the same images, with a paired interval."""

import io
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from compress import cli, comparison, ledger, report, show
from compress.metrics.bootstrap import paired

VALUES = np.random.default_rng(3).uniform(0, 100, 50)


def write_run(folder, lock, values, images=None, split="val"):
    """A run of one row, with what it said."""
    artifact = folder.parent / ".cache" / lock
    artifact.mkdir(parents=True)
    images = images or [f"{index}.jpg" for index in range(len(values))]
    said = [{"image": image, "caption": "a dog", "cider": float(value)} for image, value in zip(images, values, strict=True)]
    ledger.captions_file(artifact, split).write_text(json.dumps(said))
    folder.mkdir()
    row = {"stage": "prune", "name": "pruned", "artifact": f"../.cache/{lock}", "split": split, "lock": lock}
    ledger.write(folder / "ledger.jsonl", [row | {"cider": float(np.mean(values))}])


def test_the_difference_is_that_of_the_same_images_in_whatever_order(tmp_path):
    write_run(tmp_path / "a", "1", VALUES)
    better = VALUES + np.random.default_rng(4).uniform(-2, 6, 50)
    write_run(tmp_path / "b", "2", better[::-1], [f"{index}.jpg" for index in reversed(range(50))])
    (found,) = comparison.compared([str(tmp_path / name) for name in "ab"])["differences"]
    assert (found["run"], found["name"], found["against"]) == (str(tmp_path / "b"), "pruned", str(tmp_path / "a"))
    assert found["delta_cider"] == pytest.approx(np.mean(better - VALUES))
    low, high = found["delta_ci95"]
    assert 0 < low < found["delta_cider"] < high and found["p_value"] < 0.01
    assert (low, high) == pytest.approx(paired(better[::-1], VALUES[::-1]).ci95)


@pytest.mark.parametrize("other", [
    {"lock": "1"}, {"images": [f"{index}.png" for index in range(50)]}, {"split": "test"},
], ids=["the same artifact", "other images", "another split"])
def test_what_cannot_be_compared_is_left_out(tmp_path, other):
    write_run(tmp_path / "a", "1", VALUES)
    (tmp_path / "elsewhere").mkdir()
    write_run(tmp_path / "elsewhere" / "b", **{"lock": "2", "values": VALUES} | other)
    runs = [str(tmp_path / "a"), str(tmp_path / "elsewhere" / "b")]
    assert comparison.compared(runs)["differences"] == []


def test_what_another_run_measured_on_other_images_since_is_left_out(tmp_path):
    """Both runs share their images; the artifact of one row has been measured on others for a third run."""
    for name, lock in (("a", "1"), ("b", "2")):
        write_run(tmp_path / name, lock, VALUES)
        [row] = ledger.read(tmp_path / name / "ledger.jsonl")
        nearest = row | {"stage": "baseline", "name": "nearest", "artifact": "../.cache/0"}
        ledger.write(tmp_path / name / "ledger.jsonl", [nearest, row])
        for known, images in (("0", "x"), (lock, "x")):
            (tmp_path / ".cache" / known).mkdir(exist_ok=True)
            (tmp_path / ".cache" / known / "lock.json").write_text(json.dumps({"images": {"val": images}}))
    runs = [str(tmp_path / name) for name in "ab"]
    assert [found["name"] for found in comparison.compared(runs)["differences"]] == ["pruned"]
    (tmp_path / ".cache" / "2" / "lock.json").write_text(json.dumps({"images": {"val": "y"}}))
    assert comparison.compared(runs)["differences"] == []


def test_runs_of_other_data_are_not_compared(tmp_path):
    """Generated scenes of another seed have the same names; the better and smaller of two is not better on other pictures."""
    for name, lock, data, size in (("a", "1", "x", 20), ("b", "2", "y", 10), ("c", "3", "x", 10)):
        write_run(tmp_path / name, lock, VALUES)
        (tmp_path / ".cache" / lock / "lock.json").write_text(json.dumps({"images": data}))
        [row] = ledger.read(tmp_path / name / "ledger.jsonl")
        ledger.write(tmp_path / name / "ledger.jsonl", [row | {"bytes": size, "latency_ms": {"p50": 1.0}}])
    found = comparison.compared([str(tmp_path / name) for name in "abc"])
    assert [entry["run"] for entry in found["differences"]] == [str(tmp_path / "c")]
    assert [entry["run"] for entry in found["pareto"]] == [str(tmp_path / "b"), str(tmp_path / "c")]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show.compare(found))
    starred = [line.split("│")[1].strip() for line in console.export_text().splitlines() if "*" in line and "│" in line]
    report.write(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert starred == ["b", "c"] and text.count('class="best"') == 2
    lines = [re.findall(r'<polyline points="([^"]*)"', chart) for chart in text.split("</svg>")[:2]]
    assert [[len(line.split()) for line in chart] for chart in lines] == [[1, 1], [1, 1]]  # "a" lies behind "c"


def test_runs_stay_comparable_when_an_artifact_is_measured_on_another_split_too(tmp_path):
    for name, lock, said in (("a", "1", {"val": "x"}), ("b", "2", {"test": "z", "val": "x"}), ("c", "3", {"test": "z", "val": "other"})):
        write_run(tmp_path / name, lock, VALUES)
        (tmp_path / ".cache" / lock / "lock.json").write_text(json.dumps({"images": said}))
    found = comparison.compared([str(tmp_path / name) for name in "abc"])
    assert [entry["images"] for entry in found["runs"]] == ["x", "x", "other"]
    assert [entry["run"] for entry in found["differences"]] == [str(tmp_path / "b")]


def test_captions_that_are_gone_leave_the_row(tmp_path):
    for name, lock in zip("ab", "12", strict=True):
        write_run(tmp_path / name, lock, VALUES)
    ledger.captions_file(tmp_path / ".cache" / "1", "val").unlink()
    assert comparison.compared([str(tmp_path / name) for name in "ab"])["differences"] == []


def test_compare_says_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", "1", VALUES)
    write_run(tmp_path / "b", "2", VALUES + 3)
    output = CliRunner().invoke(cli.cli, ["compare", "a", "b", "--html", "report.html"], catch_exceptions=False).output
    assert "CIDEr less that of a, on the same images" in output and "+3.00 [+3.00, +3.00]" in output
    assert "+3.00 [+3.00, +3.00]" in (tmp_path / "report.html").read_text()
    assert "CIDEr less that of" not in CliRunner().invoke(cli.cli, ["compare", "a"]).output
