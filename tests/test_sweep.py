"""A recipe with several values: every combination once, read before any is run, side by side in the end."""

import json
from pathlib import Path

import pytest
import yaml

from compress import cli, pipeline, sweep
from compress.context import Progress
from compress.errors import DataError, GateError, RecipeError, UsageError


def test_combinations_are_all_of_them_in_order():
    assert sweep.combinations(["pruned.macs=0.8,0.5", "student.match=[tokens, hidden],tokens"]) == [
        ("pruned.macs=0.8", "student.match=[tokens, hidden]"), ("pruned.macs=0.8", "student.match=tokens"),
        ("pruned.macs=0.5", "student.match=[tokens, hidden]"), ("pruned.macs=0.5", "student.match=tokens"),
    ]


@pytest.mark.parametrize("vary", ["pruned.macs", "pruned.macs=0.5", "=1,2", "pruned.macs=0.5,,0.6", "pruned.macs=0.5,0.5"])
def test_a_key_without_two_values_is_refused(vary):
    with pytest.raises(UsageError, match="write NAME.key=a,b with two different values or more"):
        sweep.combinations([vary])


def test_a_key_varies_once():
    with pytest.raises(UsageError, match="'seed' varies already"):
        sweep.combinations(["seed=1,2", "seed =3,4"])


def test_folders_say_what_was_set(tmp_path):
    found = sweep.recipes("quickstart", ["seed=3"], ["pruned.macs=0.8,0.5", "student.match=[tokens, hidden],tokens"], None)
    assert [str(folder) for folder, _, _ in found][:2] == [
        "runs/quickstart-pruned.macs-0.8-student.match-tokens-hidden", "runs/quickstart-pruned.macs-0.8-student.match-tokens"
    ]
    assert [(recipe.seed, recipe.stages[3].config.macs) for _, _, recipe in found] == [(3, 0.8)] * 2 + [(3, 0.5)] * 2
    [first, _] = sweep.recipes("quickstart", [], ["seed=1,2"], tmp_path / "mine")
    assert first[0] == tmp_path / "mine-seed-1"
    with pytest.raises(RecipeError, match="'macs' must be above 0 and below 1, not 1.5"):
        sweep.recipes("quickstart", [], ["pruned.macs=0.5,1.5"], None)


def test_the_command_runs_each_and_goes_on_after_one_that_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = {"name": "x", "stages": [{"train": {"as": "teacher", "preset": "tiny"}}, {"prune": {"as": "pruned", "macs": 0.5}}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    asked = []

    def run(wanted, out, progress):
        asked.append((str(out), wanted.stages[1].config.macs))
        out.mkdir(parents=True)
        if wanted.stages[1].config.macs == 0.4:
            return pipeline.Result(out, (), DataError("no captions there"))
        row = {"stage": "prune", "name": "pruned", "cider": 100 * wanted.stages[1].config.macs, "bytes": 1000, "latency_ms": {"p50": 1.0},
               "artifact": "../made"}
        (out.parent / "made").mkdir(exist_ok=True)
        (out.parent / "made" / "lock.json").write_text('{"images": "f"}')
        (out / "ledger.jsonl").write_text(json.dumps(pipeline.ledger.row(row)) + "\n")
        return pipeline.Result(out, (row,), GateError("stage 'pruned' missed its gate") if wanted.stages[1].config.macs == 0.5 else None)

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "x.yaml", "--vary", "pruned.macs=0.8,0.5,0.3", "--json"])
    output, error = capsys.readouterr()
    value = json.loads(output)
    assert ended.value.code == 1 and "run 2 of 3: pruned.macs=0.5\nlightcap: stage 'pruned' missed its gate" in error
    assert asked == [("runs/x-pruned.macs-0.8", 0.8), ("runs/x-pruned.macs-0.5", 0.5), ("runs/x-pruned.macs-0.3", 0.3)]
    assert [entry["run"] for entry in value["runs"]] == [folder for folder, _ in asked]
    assert value["pareto"] == [{"run": "runs/x-pruned.macs-0.8", "stage": "prune", "name": "pruned"}]
    assert value["ok"] is False and value["failed"] == [{"run": "runs/x-pruned.macs-0.5", "error": "stage 'pruned' missed its gate"}]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "x.yaml", "--vary", "pruned.macs=0.4,0.2"])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("lightcap: no captions there\n") and len(asked) == 4


def test_what_a_later_run_cannot_use_stops_no_other(monkeypatch, tmp_path):
    """The first run's result is not lost, and those behind are made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("name: x\nstages: [{train: {as: teacher, preset: tiny}}]\n")

    def run(wanted, out, progress):
        if wanted.seed == 2:
            return pipeline.Result(out, (), RecipeError("hidden (64) must be a multiple of attention_heads (3)"))
        out.mkdir(parents=True)
        row = pipeline.ledger.row({"stage": "train", "name": "teacher", "artifact": "../.cache/1", "cider": float(wanted.seed)})
        (out / "ledger.jsonl").write_text(json.dumps(row) + "\n")
        return pipeline.Result(out, (row,))

    monkeypatch.setattr(pipeline, "run", run)
    value = sweep.run(sweep.recipes("x.yaml", [], ["seed=1,2,3"], None), Progress(quiet=True))
    assert [entry["rows"][0]["cider"] for entry in value["runs"]] == [1.0, 3.0] and not value["ok"]
    assert value["failed"] == [{"run": "runs/x-seed-2", "error": "hidden (64) must be a multiple of attention_heads (3)"}]


def test_runs_that_would_share_a_folder_are_refused():
    with pytest.raises(UsageError, match="two of the runs would be runs/quickstart-data.images-a-b"):
        sweep.recipes("quickstart", [], ["data.images=a/b,a-b"], None)
    with pytest.raises(UsageError, match="--out .: name a folder"):
        sweep.recipes("quickstart", [], ["seed=1,2"], Path("."))
