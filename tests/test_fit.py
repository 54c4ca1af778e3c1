"""The share of MACs that limits leave: found by bisection, judged by one full run."""

import json
import os
from pathlib import Path

import pytest

from compress import cli, fit, pipeline
from compress.context import Progress
from compress.errors import GateError, TargetError, UsageError
from compress.recipe import read_recipe


@pytest.mark.parametrize("edge", [0.98, 0.97, 0.5, 0.21, 0.2])
def test_the_largest_share_is_found_to_a_step(edge):
    asked = []

    def holds(share):
        asked.append(share)
        return share <= edge

    assert edge - fit.STEP < fit.largest(holds) <= edge + 1e-9 and len(asked) <= 8
    assert fit.largest(lambda share: False) is None
    within_reach = fit.largest(lambda share: None if share < 0.3 else share <= edge)
    assert within_reach == (None if edge < 0.3 else fit.largest(lambda share: share <= edge))


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Runs whose artifact has as many megabytes, and tenths of milliseconds, as its share of MACs in percent; those recovered lose a tenth
    of what is pruned away in CIDEr. The recipes that were asked for."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(wanted, out, progress, gates, sizes_only=()):
        assert not gates
        names = [stage.name for stage in wanted.stages]
        assert list(sizes_only) == (names[names.index("pruned") :] if "unrecovered" in out.name else [])
        asked.append((wanted, out))
        prune = next(stage for stage in wanted.stages if stage.kind == "prune").config
        if prune.macs < 0.25:
            return pipeline.Result(out, (), TargetError("prune: macs 1 cannot be reached"))
        lost = 10 * (1 - prune.macs) if prune.recover_epochs else 60.0
        values = {"bytes": int(prune.macs * 100e6), "latency_ms": {"p50": prune.macs * 10}}
        ciders = {stage: 60.0 if stage.name == "vocabulary" else 60.0 - lost for stage in wanted.stages}
        rows = [values | {"stage": stage.kind, "name": stage.name, "cider": cider} for stage, cider in ciders.items()]
        return pipeline.Result(out, tuple(map(pipeline.ledger.row, rows)))

    monkeypatch.setattr(pipeline, "run", run)
    return asked


def test_no_more_is_pruned_than_the_limits_ask_for(world):
    found = fit.fit("quickstart", ["seed=3", "int8.trials=0"], fit.Limits(mb=71.0, ms=9.0, drop_cider=4.0), None, Progress(quiet=True))
    assert (found["ok"], found["macs"], found["mb"], found["against"]) == (True, 0.7, pytest.approx(70), "vocabulary")
    assert found["drop_cider"] == pytest.approx(3.0) and found["run"] == "runs/quickstart-fit"
    own = f"runs/quickstart-fit.unrecovered-{os.getpid()}"  # of two at once, none removes the other's
    assert [str(out) for _, out in world] == [own] * (len(world) - 1) + ["runs/quickstart-fit"]
    *probes, last = [recipe for recipe, _ in world]
    prunes, quantizes = ([next(stage for stage in one.stages if stage.kind == kind).config for one in (*probes, last)]
                         for kind in ("prune", "quantize"))
    recovery = [(p.recover_epochs, p.recover_encoder_epochs, p.recover_concepts_epochs, p.max_drop_cider) for p in prunes[:-1]]
    assert set(recovery) == {(0.0, 0.0, 0.0, None)}
    own = next(stage for stage in read_recipe("quickstart").stages if stage.kind == "prune").config
    assert (prunes[-1].macs, prunes[-1].recover_epochs) == (0.7, own.recover_epochs) and last.seed == 3
    assert all((q.trials, q.tune_epochs) == (0, 0.0) for q in quantizes)
    assert [item["held"] for item in found["tried"]] == [item["macs"] <= 0.7 for item in found["tried"]]

    slow = fit.fit("quickstart", [], fit.Limits(ms=5.0), None, Progress(quiet=True))
    assert slow["ok"] and 5.0 * fit.MARGIN - 0.2 < slow["ms"] <= 5.0 * fit.MARGIN


def test_probes_leave_out_what_trains_behind_the_pruning(world):
    """photos: CIDEr optimisation stands between pruning and INT8, which searches."""
    found = fit.fit("photos", [], fit.Limits(mb=71.0), None, Progress(quiet=True))
    *probes, last = [recipe for recipe, _ in world]
    own = read_recipe("photos")
    assert last.stages[:-4] == own.stages[:-4] and [stage.name for stage in last.stages] == [stage.name for stage in own.stages]
    assert last.stages[-3:] == own.stages[-3:] and found["macs"] == 0.68 <= 71.0 * fit.MARGIN / 100  # parts may go back to float
    for probe in probes:
        assert probe.stages[:-3] == own.stages[:-4]
        pruned, int8, export = probe.stages[-3:]
        assert (pruned.name, int8.name, int8.parent, int8.against, export.parent) == ("pruned", "int8", "pruned", "pruned", "int8")
        assert (pruned.config.recover_epochs, int8.config.trials, int8.config.tune_epochs) == (0.0, 0, 0.0)


BRANCHED = """
extends: quickstart
after: vocabulary
stages:
  - prune:    {as: pruned, macs: 0.8}
  - quantize: {as: int8}
  - scst:     {as: end, from: pruned, epochs: 1}
  - scst:     {as: end-2, from: pruned, seed: 18, epochs: 1}
  - average:  {as: mean, from: end, others: [end-2]}
"""


def test_the_size_of_a_last_stage_that_is_left_out_is_its_parents(tmp_path):
    (tmp_path / "branched.yaml").write_text(BRANCHED)
    wanted = read_recipe(str(tmp_path / "branched.yaml"))
    bare, name = fit.untrained(wanted, fit.pruning(wanted))
    assert ([stage.name for stage in bare.stages[-2:]], name) == (["pruned", "int8"], "pruned")
    (tmp_path / "again.yaml").write_text(BRANCHED + "  - distill: {as: again, from: pruned, teachers: vocabulary, epochs: 1}\n")
    bare, name = fit.untrained(again := read_recipe(str(tmp_path / "again.yaml")), fit.pruning(again))
    assert ([stage.name for stage in bare.stages[-2:]], name) == (["pruned", "int8"], "pruned")
    (tmp_path / "taught.yaml").write_text(BRANCHED + "  - distill: {as: small, teachers: [mean], epochs: 1}\n")
    wanted = read_recipe(str(tmp_path / "taught.yaml"))  # what teaches a model of another shape stays
    bare, name = fit.untrained(wanted, fit.pruning(wanted))
    assert [stage.name for stage in bare.stages[-6:]] == ["pruned", "int8", "end", "end-2", "mean", "small"] and name == "small"


def test_limits_that_cannot_be_held_fail_in_one_line(world):
    with pytest.raises(GateError, match="the limits cannot be held: 0.26 of MACs is still 26.00 MB and 2.6 ms"):
        fit.fit("quickstart", [], fit.Limits(mb=10.0), None, Progress(quiet=True))
    with pytest.raises(UsageError, match="give --max-mb, --max-ms or both"):
        fit.fit("quickstart", [], fit.Limits(drop_cider=1.0), None, Progress(quiet=True))
    with pytest.raises(UsageError, match="one 'prune' stage; ablation has 0"):
        fit.fit("ablation", [], fit.Limits(mb=10.0), None, Progress(quiet=True))
    Path("x.yaml").write_text("stages: [{train: {preset: tiny}}, {concepts: {}}, {prune: {as: cut, macs: 0.5}}]\n")
    with pytest.raises(UsageError, match="fit judges captions, and 'concepts', which 'cut' works on, has none yet"):
        fit.fit("x.yaml", [], fit.Limits(mb=10.0), None, Progress(quiet=True))
    stages = "{train: {preset: tiny}}, {prune: {as: cut, macs: 0.5}}, {export: {}}, {export: {as: whole, from: train}}"
    Path("x.yaml").write_text(f"stages: [{stages}]\n")
    with pytest.raises(UsageError, match="fit judges the last stage, and 'whole' is not made of 'cut'; end with one that is"):
        fit.fit("x.yaml", [], fit.Limits(mb=10.0), None, Progress(quiet=True))
    Path("x.yaml").write_text("stages: [{train: {preset: tiny}}, {prune: {as: cut, macs: 0.5}}, {concepts: {}}]\n")
    with pytest.raises(UsageError, match="fit judges the last stage's captions, and 'concepts' has none yet; end with a captioner"):
        fit.fit("x.yaml", [], fit.Limits(mb=10.0), None, Progress(quiet=True))
    with pytest.raises(UsageError, match="--out .: name a folder"):
        fit.fit("quickstart", [], fit.Limits(mb=10.0), Path("."), Progress(quiet=True))


def test_a_stage_that_may_remove_next_to_nothing_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    unreachable = TargetError("prune: macs 1 cannot be reached")
    monkeypatch.setattr(pipeline, "run", lambda wanted, out, *_, **__: pipeline.Result(out, (), unreachable))
    with pytest.raises(GateError, match="nothing that 'pruned' may remove comes to 0.98 of MACs"):
        fit.fit("quickstart", [], fit.Limits(mb=10.0), None, Progress(quiet=True))


def test_the_command_says_whether_cider_holds(world, capsys):
    for drop, status in (("6", 0), ("4", 1)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", "quickstart", "--set", "int8.trials=0", "--max-mb", "50.01", "--max-drop-cider", drop, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (ended.value.code, found["ok"], found["macs"]) == (status, status == 0, 0.5)
    with pytest.raises(SystemExit):
        cli.main(["fit", "quickstart", "--set", "int8.trials=0", "--max-mb", "50.01", "--max-drop-cider", "4"])
    assert "not met: 0.5 of MACs, 50.00 MB, 5.0 ms, CIDEr -5.00 against 'vocabulary'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_recipe_comes_under_its_limit_in_megabytes(monkeypatch, tmp_path):
    """Down to where nothing more can be removed: shares below it are no failure."""
    monkeypatch.chdir(tmp_path)
    small = ["data.train_images=48", "data.val_images=12", "teacher.epochs=1", "student.epochs=1", "pruned.recover_epochs=1",
             "pruned.recover_encoder_epochs=1", "int8.calibration_images=16", "int8.trials=0"]
    found = fit.fit("quickstart", small, fit.Limits(mb=0.56), None, Progress(quiet=True))
    assert found["ok"] and 0.5 < found["mb"] <= 0.56 and found["run"] == "runs/quickstart-fit"
    assert 0.2 < found["macs"] < 0.98 and sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == [".cache", "quickstart-fit"]
    assert [row["name"] for row in found["ledger"]][-1] == "export"
