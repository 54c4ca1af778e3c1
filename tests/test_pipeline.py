"""The real pipeline over stages small enough to watch: caching, ledger, gates, kills, two writers."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import compress
from compress import answer, artifact, ledger, lock, making, pipeline, process, show
from compress.artifact import Artifact
from compress.context import Progress
from compress.data import CaptionSet
from compress.data.captions import Example
from compress.errors import DataError, GateError, ModelError, StageError
from compress.models import resolve
from compress.recipe import read_recipe

ROOT = Path(compress.__file__).resolve().parent.parent
RECIPE = """\
seed: 3
student: {preset: tiny, heads: 2}
stages:
  - train: {as: teacher, preset: tiny}
  - train: {as: teacher-2, from: teacher, seed: 18}
  - distill: {as: student, teachers: [teacher, teacher-2]}
  - prune: {as: pruned, macs: 0.7, max_drop_cider: 2.0}
  - export: {}
"""
NAMES = ["nearest", "teacher", "teacher-2", "student", "pruned", "export"]
TMACS = 0.005  # near enough to what is counted for `changed` that its time is told


def captions() -> CaptionSet:
    splits = ["train"] * 40 + ["val"] * 10
    examples = [Example(f"{number}.jpg", split, ("a red ring", "one ring")) for number, split in enumerate(splits)]
    return CaptionSet(tuple(examples), "f" * 64, "rings")


def test_one_image_to_measure_on_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("student:", "data: {train_images: 8, val_images: 1}\nstudent:"))
    result = pipeline.run(read_recipe(tmp_path / "r.yaml"), tmp_path / "runs" / "r", Progress(quiet=True))
    assert isinstance(result.error, DataError) and "split 'val' is one image, of which CIDEr is 0" in result.error.message


class Evaluation:
    """Measures an artifact by what its config says; writes down each call."""

    def __init__(self, deltas: dict[str, float] | None = None) -> None:
        self.calls, self.deltas = [], deltas or {}

    def measure(self, artifact, against, context):
        self.calls.append((context.stage.name, against and against.config["name"]))
        return {"cider": 50.0, "delta_cider": self.deltas.get(context.stage.name, 0.0 if against else None), "params": 1}

    def sizes(self, artifact, context):
        self.calls.append((context.stage.name, "sizes"))
        return {"params": 1}

    def tmacs(self, recipe, data):
        return {stage.name: TMACS for stage in recipe.stages}

    def baseline(self, artifact, context):
        self.calls.append(("nearest", artifact.config["name"]))
        return {"cider": 20.0}


class Stages:
    """Every kind of stage: a config that says what it was made of, and how often each was run."""

    def __init__(self) -> None:
        self.runs = []

    def __getitem__(self, kind):
        return self.run

    def run(self, parent, config, context):
        self.runs.append(context.stage.name)
        made_of = {"name": context.stage.name, "parent": parent and parent.digest(), "seed": context.seed}
        (context.output / "config.json").write_text(json.dumps(made_of))
        (context.output / "tokenizer.json").write_text("{}")
        (context.output / "preprocessor_config.json").write_text("{}")
        save_file({"weight": np.arange(4, dtype=np.float32) * context.seed}, context.output / "model.safetensors")


def read(tmp_path: Path, text: str = RECIPE, *settings: str):
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    return read_recipe(path, settings)


def go(tmp_path, wanted=None, stages=None, evaluation=None, out="runs/chain", **more):
    wanted = wanted or read(tmp_path)
    stages, evaluation = stages or Stages(), evaluation or Evaluation()
    result = pipeline.run(
        wanted, tmp_path / out, Progress(quiet=True), stages=stages, evaluation=evaluation, **{"data": captions()} | more
    )
    return result, stages, evaluation


def test_a_run_makes_every_stage_once(tmp_path):
    (tmp_path / "runs/chain/.told-abc").mkdir(parents=True)  # left by processes that were killed
    result, stages, evaluation = go(tmp_path)
    assert result.check().ok
    assert stages.runs == NAMES[1:]
    assert evaluation.calls == [
        ("teacher", None),
        ("nearest", "teacher"),
        ("teacher-2", "teacher"),
        ("student", "teacher"),
        ("pruned", "student"),
        ("export", "pruned"),
    ]
    rows = ledger.read(tmp_path / "runs/chain/ledger.jsonl")
    assert rows == list(result.rows)
    assert [row["name"] for row in rows] == NAMES
    assert [row["stage"] for row in rows] == ["baseline", "train", "train", "distill", "prune", "export"]
    assert all(tuple(row) == ledger.ROW for row in rows)
    assert all(row["seconds"] >= 0 and row["peak_mb"] > 1 and len(row["lock"]) == 64 for row in rows)
    for row in rows[1:]:
        folder = tmp_path / "runs/chain" / row["artifact"]
        assert folder.resolve() == (tmp_path / "runs/.cache" / row["lock"]).resolve()
        assert Artifact(folder).row() == row
        noted = json.loads((folder / "lock.json").read_text())
        assert lock.digest(noted["parts"]) == noted["lock"] == row["lock"]
        assert f"# {row['name']}" in (folder / "README.md").read_text()
    seeds = [Artifact(tmp_path / "runs/chain" / row["artifact"]).config["seed"] for row in rows[1:]]
    assert seeds == [3, 18, 3, 3, 3]
    assert resolve(tmp_path / "runs/chain").config["name"] == "export"
    assert sorted(path.name for path in (tmp_path / "runs/chain").iterdir()) == ["ledger.jsonl", "recipe.yaml"]
    assert {path.name for path in (tmp_path / "runs/.cache").iterdir()} == {row["lock"] for row in rows}  # nothing is left over
    assert read_recipe(tmp_path / "runs/chain/recipe.yaml") == read(tmp_path)


def test_a_second_run_finds_everything(tmp_path):
    first, *_ = go(tmp_path)
    again, stages, evaluation = go(tmp_path)
    assert again.rows == first.rows
    assert stages.runs == [] and evaluation.calls == []


def test_against_another_artifact_nothing_is_made(tmp_path):
    """What a row is compared with changes the row alone."""
    first, *_ = go(tmp_path)
    again, stages, evaluation = go(tmp_path, read(tmp_path, RECIPE, "pruned.against=teacher"))
    assert stages.runs == [] and evaluation.calls == [("pruned", "teacher")]
    assert [row["lock"] for row in again.rows] == [row["lock"] for row in first.rows]


def test_a_change_makes_only_what_depends_on_it(tmp_path):
    go(tmp_path)
    _, stages, _ = go(tmp_path, read(tmp_path, RECIPE, "pruned.macs=0.5"))
    assert stages.runs == ["pruned", "export"]
    _, stages, _ = go(tmp_path, read(tmp_path, RECIPE, "teacher-2.seed=20"), out="runs/elsewhere")
    assert stages.runs == ["teacher-2", "student", "pruned", "export"]


def test_a_renamed_stage_is_the_same_artifact(tmp_path):
    go(tmp_path)
    result, stages, _ = go(tmp_path, read(tmp_path, RECIPE.replace("pruned", "small")))
    assert stages.runs == []
    assert [row["name"] for row in result.rows] == [*NAMES[:4], "small", "export"]


def test_a_cached_run_imports_no_torch(tmp_path):
    first, *_ = go(tmp_path)
    code = textwrap.dedent(
        f"""
        import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from compress import pipeline, recipe
        import test_pipeline as t
        folder = Path({str(tmp_path)!r})
        result = pipeline.run(recipe.read_recipe(folder / "chain.yaml"), folder / "runs/chain", data=t.captions())
        assert result.ok, result.error
        print(len(result.rows), "torch" in sys.modules)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == f"{len(first.rows)} False\n", done.stderr


def environment() -> dict:
    threads = str(process.thread_count())  # the lock holds it
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}


def test_a_run_in_a_linked_folder_finds_its_artifacts(tmp_path):
    """Its cache lies beside the link."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/chain").symlink_to(tmp_path / "far" / "away", target_is_directory=True)
    result, *_ = go(tmp_path)
    assert result.ok and resolve(tmp_path / "runs/chain").config["name"] == "export"
    assert all((tmp_path / "far/away" / row["artifact"] / "metrics.json").is_file() for row in result.rows)


def test_what_was_noted_of_an_artifact_and_is_broken_is_named(tmp_path):
    result, *_ = go(tmp_path)
    file = tmp_path / "runs/chain" / result.rows[3]["artifact"] / "lock.json"
    file.write_text("{")
    with pytest.raises(ModelError, match="lock.json: is not JSON"):
        pipeline.plan(read(tmp_path), tmp_path / "runs/chain", data=captions())
    again, *_ = go(tmp_path)
    assert "lock.json: is not JSON" in again.error.message and "the last good artifact is 'teacher-2'" in again.error.message
    said = pipeline.ledger.captions_file(file.parent, "val")
    said.write_text("[")
    with pytest.raises(ModelError, match="captions.val.json: is not JSON"):
        pipeline.ledger.captions(tmp_path / "runs/chain", dict(result.rows[3]) | {"split": "val"})


def test_plan_and_run_say_why_a_stage_is_made_anew(tmp_path, monkeypatch, capsys):
    go(tmp_path)
    lines = []
    monkeypatch.setattr(Progress, "log", lambda progress, line: lines.append(line))

    def changed(text=RECIPE, *settings, data=None):
        planned = pipeline.plan(read(tmp_path, text, *settings), tmp_path / "runs/chain", data=data or captions())
        assert not any(stage["cached"] and stage["changed"] for stage in planned["stages"])
        return {stage["name"]: stage["changed"] for stage in planned["stages"] if not stage["cached"]}

    assert changed() == {}
    assert changed(RECIPE, "pruned.macs=0.5") == {"pruned": ["macs 0.7 -> 0.5"], "export": []}  # export: as its parent is another
    assert changed(RECIPE, "seed=4")["teacher"] == ["seed 3 -> 4"]
    assert changed(RECIPE.replace("from: teacher, seed: 18", "from: teacher, seed: 18, epochs: 2"))["student"] == []
    moved = changed(RECIPE.replace("  - prune: {", "  - prune: {from: teacher, "))
    assert moved == {"pruned": ["from student -> teacher"], "export": []}
    taught = changed(RECIPE.replace("[teacher, teacher-2]", "[teacher-2, teacher]"))
    assert taught["student"] == ["teachers teacher, teacher-2 -> teacher-2, teacher"]
    kind = changed(RECIPE.replace("prune: {as: pruned, macs: 0.7, max_drop_cider: 2.0}", "vocabulary: {as: pruned}"))
    assert kind["pruned"] == ["prune -> vocabulary"]
    others = dataclasses.replace(captions(), fingerprint="e" * 64)
    assert changed(data=others)["teacher"] == ["the training images or their captions"]
    monkeypatch.setattr(pipeline, "thread_count", lambda: 7)
    threads = changed()
    assert len(threads) == 5 and len({tuple(one) for one in threads.values()}) == 1
    assert threads["teacher"] == [f"threads {process.thread_count()} -> 7"]
    answer.print_drawn(show.plan(pipeline.plan(read(tmp_path), tmp_path / "runs/chain", data=captions())))
    assert f"changed since the last run: {threads['teacher'][0]} (teacher, teacher-2 and 3 more)" in capsys.readouterr().out

    go(tmp_path)
    assert lines[0].startswith("[1/5] teacher: train, made anew (threads ") and lines[0].endswith(" -> 7)"), lines
    lines.clear()
    go(tmp_path)
    assert lines[0] == "[1/5] teacher: cached"


def test_plan_says_what_is_cached(tmp_path):
    wanted = read(tmp_path)
    before = pipeline.plan(wanted, tmp_path / "runs/chain", data=captions())
    assert [stage["cached"] for stage in before["stages"]] == [False] * 5
    assert not (tmp_path / "runs").exists()
    result, *_ = go(tmp_path)
    after = pipeline.plan(wanted, tmp_path / "runs/chain", data=captions())
    assert after["recipe"] == "chain" and after["digest"] == before["digest"]
    assert [(stage["cached"], stage["measured"]) for stage in after["stages"]] == [(True, True)] * 5
    assert [stage["lock"] for stage in after["stages"]] == [row["lock"] for row in result.rows[1:]]
    assert [stage["lock"] for stage in before["stages"]] == [stage["lock"] for stage in after["stages"]]
    numbers = tmp_path / "runs/chain" / result.rows[4]["artifact"] / "metrics.json"
    numbers.write_text(json.dumps(json.loads(numbers.read_text()) | {"seconds": 1000}))  # a stage that took its time
    changed = pipeline.plan(read(tmp_path, RECIPE, "pruned.macs=0.5"), tmp_path / "runs/chain", data=captions())
    assert [stage["cached"] for stage in changed["stages"]] == [True, True, True, False, False]
    assert [stage["measured"] for stage in changed["stages"]] == [True, True, True, False, False]
    elsewhere = pipeline.plan(read(tmp_path, RECIPE, "data.val_split=train"), tmp_path / "runs/chain", data=captions())
    assert [(stage["cached"], stage["measured"]) for stage in elsewhere["stages"]] == [(True, False)] * 5
    assert [stage["tmacs"] for stage in changed["stages"]][:3] == [TMACS] * 3  # as written down
    assert changed["stages"][3]["tmacs"] > 0 and changed["stages"][4]["tmacs"] > 0
    assert changed["stages"][3]["seconds"] == pytest.approx(1000 / TMACS * changed["stages"][3]["tmacs"], abs=0.1)
    assert [stage["seconds"] for stage in before["stages"]] == [None] * 5


def test_numbers_of_a_measurement_that_was_stopped_are_nobodys(tmp_path, monkeypatch):
    """Another split is measured, and that stops after an artifact's numbers are written and before it is noted whose they are."""
    class OfSplit(Evaluation):
        def measure(self, artifact, against, context):
            return super().measure(artifact, against, context) | {"cider": {"val": 50.0, "train": 99.0}[context.recipe.data.val_split]}

    assert go(tmp_path, evaluation=OfSplit())[0].ok
    with monkeypatch.context() as patch:

        def write(path, value):
            if path.name == "lock.json" and value["measured"] is not None:
                raise KeyboardInterrupt
            write_json(path, value)

        write_json = artifact.write_json
        patch.setattr(artifact, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, read(tmp_path, RECIPE, "data.val_split=train"), evaluation=OfSplit())
    result, stages, _ = go(tmp_path, evaluation=OfSplit())
    assert result.ok and not stages.runs and {row["cider"] for row in result.rows[1:]} == {50.0}


def test_other_validation_images_are_measured_and_nothing_is_trained(tmp_path):
    text = RECIPE.replace("max_drop_cider: 2.0}", "max_drop_cider: 2.0, steps: 2}")  # which itself looks at val
    for name, runs in (("a", NAMES[1:]), ("b", ["pruned", "export"])):
        data = dataclasses.replace(captions(), fingerprint=name * 64, marks={"train": "t" * 64, "val": name * 64})
        result, stages, evaluation = go(tmp_path, read(tmp_path, text), data=data)
        assert result.ok and stages.runs == runs and len(evaluation.calls) == 6


def test_a_stop_while_a_run_is_measured_anew_hides_none_of_its_artifacts(tmp_path):
    class Stopped(Evaluation):
        def measure(self, artifact, against, context):
            if context.stage.name == "student":
                raise KeyboardInterrupt
            return super().measure(artifact, against, context)

    first, *_ = go(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, read(tmp_path, RECIPE, "data.val_split=train"), evaluation=Stopped())
    rows = ledger.read(tmp_path / "runs/chain/ledger.jsonl")
    assert [row["name"] for row in rows] == NAMES and rows[3:] == list(first.rows[3:])
    assert resolve(tmp_path / "runs/chain").config["name"] == "export"
    with pytest.raises(KeyboardInterrupt):  # those of another recipe are not its own
        go(tmp_path, read(tmp_path, RECIPE, "seed=4"), evaluation=Stopped())
    assert [row["name"] for row in ledger.read(tmp_path / "runs/chain/ledger.jsonl")] == NAMES[:3]


def test_a_failure_while_a_run_is_measured_anew_hides_none_of_its_artifacts(tmp_path):
    class Full(Evaluation):
        def measure(self, artifact, against, context):
            if context.stage.name == "student":
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().measure(artifact, against, context)

    first, *_ = go(tmp_path)
    result, *_ = go(tmp_path, read(tmp_path, RECIPE, "data.val_split=train"), evaluation=Full())
    assert [row["name"] for row in result.rows] == NAMES[:3] and "stage 'student' failed: OSError" in result.error.message
    rows = ledger.read(tmp_path / "runs/chain/ledger.jsonl")
    assert [row["name"] for row in rows] == NAMES and rows[3:] == list(first.rows[3:])
    assert resolve(tmp_path / "runs/chain").config["name"] == "export"


def test_images_that_are_not_measured_on_change_no_row(tmp_path):
    for name, anew in (("a", 6), ("b", 0)):
        data = dataclasses.replace(captions(), fingerprint=name * 64, marks={"train": "t" * 64, "val": "v" * 64})
        result, stages, evaluation = go(tmp_path, data=data)
        assert result.ok and len(evaluation.calls) == anew and bool(stages.runs) == bool(anew)


def test_rows_of_size_and_time_alone_are_none_of_a_run_that_asks_for_captions(tmp_path):
    result, stages, evaluation = go(tmp_path, sizes_only=["pruned", "export"], gates=False)
    assert result.ok and [row["cider"] for row in result.rows] == [20.0, 50.0, 50.0, 50.0, None, None]
    assert evaluation.calls[-2:] == [("pruned", "sizes"), ("export", "sizes")] and result.rows[-1]["params"] == 1
    again, stages, evaluation = go(tmp_path)
    assert again.ok and not stages.runs and evaluation.calls == [("pruned", "student"), ("export", "pruned")]
    assert [row["cider"] for row in again.rows] == [20.0, *[50.0] * 5]


def test_what_a_kill_at_the_very_end_left_is_removed(tmp_path):
    first, *_ = go(tmp_path)
    left = tmp_path / "runs/.cache" / f"{first.rows[2]['lock']}.work"
    (left / "state").mkdir(parents=True)
    (left / "state" / "train.safetensors").write_bytes(b"moments")
    again, stages, _ = go(tmp_path)
    assert again.rows == first.rows and not stages.runs and not left.exists()


# ---- failures


def test_a_missed_gate_stops_the_run(tmp_path):
    result, stages, _ = go(tmp_path, evaluation=Evaluation({"pruned": -2.5}))
    assert isinstance(result.error, GateError) and result.error.exit_code == 1
    assert "stage 'pruned' missed its gate: CIDEr fell by 2.50, max_drop_cider is 2" in result.error.message
    assert "the last good artifact is 'student'" in result.error.message
    assert "export" not in stages.runs
    assert [row["name"] for row in result.rows] == NAMES[:4]
    assert resolve(tmp_path / "runs/chain").config["name"] == "student"
    again, stages, _ = go(tmp_path)
    assert isinstance(again.error, GateError) and stages.runs == []  # measured already
    assert result.json()["ok"] is False and result.json()["error"] == result.error.message
    passed, *_ = go(tmp_path, evaluation=Evaluation({"pruned": -2.5}), gates=False)
    assert passed.ok and passed.rows[-1]["name"] == "export"
    met, *_ = go(tmp_path, read(tmp_path, RECIPE, "pruned.max_drop_cider=3"), evaluation=Evaluation({"pruned": -2.5}))
    assert met.ok


def test_code_that_changes_while_a_run_lasts_makes_nothing(tmp_path, monkeypatch):
    """What is in memory is not what lies there: neither lock would be right."""
    with monkeypatch.context() as patch:
        changed = {"compress.stages.distill"}
        for module in (lock, making.sources):
            patch.setattr(module, "changed_code", lambda known: sorted(changed & known.keys()))
        result, stages, _ = go(tmp_path)
        assert stages.runs == ["teacher", "teacher-2"] and isinstance(result.error, StageError)
        assert "stage 'student': compress.stages.distill is not what this run began with; run the same" in result.error.message
        assert not list((tmp_path / "runs/.cache").glob("*.work"))
        changed.add("compress.evaluate")
        result, stages, _ = go(tmp_path, read(tmp_path, RECIPE, "teacher.epochs=3"))
        assert stages.runs == ["teacher"] and "stage 'teacher': compress.evaluate is not what" in result.error.message
    again, stages, _ = go(tmp_path)
    assert again.ok and stages.runs == ["student", "pruned", "export"]


def test_a_file_that_a_later_stage_reads_is_missed_at_once(tmp_path):
    text = RECIPE + "  - concepts: {as: extractor, preset: tiny, regions: objects.json}\n"
    result, stages, _ = go(tmp_path, read(tmp_path, text))
    assert isinstance(result.error, DataError) and stages.runs == [] and not (tmp_path / "runs").exists()
    assert result.error.message.endswith("stage 'extractor', key 'regions': there is no file objects.json; put it there, or name another "
                                         "with --set extractor.regions=FILE")
    result, *_ = go(tmp_path, read(tmp_path, text.replace("objects.json", "'a.json,b.json'")))  # as data.captions are written
    assert "key 'regions': there is no file a.json,b.json, several as [A,B]; put it there" in result.error.message


@pytest.mark.parametrize("key, value", [("encoder_weights", "clip/RN50.safetensors"), ("tokenizer", "./bert"), ("fusion_weights", "a/b/c")])
def test_weights_that_can_only_be_a_path_are_missed_at_once(tmp_path, key, value):
    wanted = read(tmp_path, RECIPE, f"student.{key}={value}")
    result, stages, _ = go(tmp_path, wanted)
    missed = f"key '{key}': there is no file or folder {value}; put it there, or name another with --set student.{key}=PATH"
    assert isinstance(result.error, DataError) and result.error.message.endswith(missed) and stages.runs == []
    with pytest.raises(DataError, match="section 'student', key .*: there is no file"):
        pipeline.plan(wanted, tmp_path / "runs/chain", captions())


@pytest.mark.parametrize(("section", "settings", "said"), [
    ("data: {image_size: 8000}", (), "x.yaml:1: data.image_size is 8000; scenes are"),
    ("data:\n  source: karpathy\n  captions: none.json", (), "x.yaml:3: data.captions: there is no file or folder none.json"),
    ("data: {source: karpathy}", ("data.captions=none.json",), "--set data.captions=none.json: data.captions: there is no file or folder"),
    ("data: {val_split: tset}", (), "x.yaml:1: scenes: there is no split 'tset'; there are: train (3), val (2)"),
    ("student: {tokenizer: ./bert}", (), "x.yaml:1: section 'student', key 'tokenizer': there is no file or folder ./bert"),
    ("student: {fusion_weights: ./bert}", (), "x.yaml:1: section 'student', key 'fusion_weights': there is no file"),
])
def test_what_a_section_names_in_vain_is_said_with_its_line(tmp_path, monkeypatch, section, settings, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(f"{section}\nstages:\n  - train: {{as: teacher, preset: tiny}}\n")
    few = () if "karpathy" in section else ("data.train_images=3", "data.val_images=2")
    wanted = read_recipe("x.yaml", (*settings, *few))
    with pytest.raises(DataError) as raised:
        pipeline.plan(wanted, tmp_path / "runs/x")
    assert raised.value.message.startswith(said)
    assert pipeline.run(wanted, tmp_path / "runs/x", Progress(quiet=True)).error.message == raised.value.message


def test_consensus_where_nobody_could_agree_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("from: teacher, seed", "from: teacher, consensus: 0.5, seed"))
    alone = tuple(dataclasses.replace(one, captions=one.captions[:1]) for one in captions().examples)
    for examples, refused in ((alone, True), ((captions().examples[0], *alone[1:]), False)):
        monkeypatch.setattr(compress.data, "load", lambda *_, examples=examples, **__: dataclasses.replace(captions(), examples=examples))
        result, stages, _ = go(tmp_path, read_recipe(tmp_path / "r.yaml"), data=None)
        assert result.ok != refused and bool(stages.runs) != refused
        if refused:
            said = "r.yaml:5: stage 'teacher-2', key 'consensus': weighs a caption by the others of its image, and here each is an only one"
            assert said in result.error.message and "--set teacher-2.consensus=0" in result.error.message


def test_names_of_the_hub_are_no_paths(tmp_path):
    assert go(tmp_path, read(tmp_path, RECIPE, "student.tokenizer=huawei-noah/TinyBERT_General_4L_312D"))[0].ok


class Failing(Stages):
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__()
        self.name, self.error = name, error

    def run(self, parent, config, context):
        if context.stage.name == self.name:
            (context.output / "half").write_text("x")
            raise self.error
        super().run(parent, config, context)


def test_a_failed_stage_keeps_the_last_good_artifact(tmp_path):
    result, *_ = go(tmp_path, stages=Failing("pruned", ZeroDivisionError("by zero")))
    assert isinstance(result.error, StageError) and result.error.exit_code == 1
    assert "stage 'pruned' failed: ZeroDivisionError: by zero" in result.error.message
    kept = result.error.message.rpartition("the last good artifact is 'student': ")[2]
    assert Artifact(Path(kept)).check().config["name"] == "student"
    assert "ZeroDivisionError" in (tmp_path / "runs/chain/error.txt").read_text()
    assert "ZeroDivisionError: by zero" in "".join(traceback.format_exception(result.error))  # what LIGHTCAP_TRACE shows
    expected, *_ = go(tmp_path, stages=Failing("pruned", StageError("the loss is nan")))
    assert "the loss is nan" in expected.error.message and not (tmp_path / "runs/chain/error.txt").exists()
    assert not list((tmp_path / "runs/.cache").rglob("half"))
    finished, stages, _ = go(tmp_path)
    assert finished.ok and stages.runs == ["pruned", "export"]
    assert not (tmp_path / "runs/chain/error.txt").exists()


def test_a_full_disk_is_a_failure_like_others(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "there")

    def write(path, text):
        if path.name == "error.txt":
            raise full
        write_text(path, text)

    write_text = artifact.write_text
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_text", write)
        result, *_ = go(tmp_path, stages=Failing("pruned", full))
    assert isinstance(result.error, StageError) and "stage 'pruned' failed: OSError: [Errno 28] No space left" in result.error.message
    assert "the last good artifact is 'student'" in result.error.message and "trace" not in result.error.message
    assert [row["name"] for row in result.rows] == NAMES[:4]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_save", lambda run_, rows: (_ for _ in ()).throw(full))
        result, *_ = go(tmp_path)
    assert isinstance(result.error, StageError)
    failed = "stage 'pruned' failed: OSError: [Errno 28] No space left on device: 'there'; the last good artifact is "
    assert result.error.message.startswith(failed)
    assert go(tmp_path)[0].ok


def test_wrong_input_writes_nothing(tmp_path):
    result, *_ = go(tmp_path, stages=Failing("teacher", DataError("no such split")))
    assert result.error.exit_code == 2
    assert result.error.message == "stage 'teacher': no such split"
    assert [path.name for path in tmp_path.iterdir()] == ["chain.yaml"]


def test_input_that_goes_away_while_a_stage_is_measured_costs_no_training(tmp_path):
    class Gone(Evaluation):
        def measure(self, artifact, against, context):
            if context.stage.name == "student":
                raise DataError("val.jpg cannot be read")
            return super().measure(artifact, against, context)

    result, stages, _ = go(tmp_path, evaluation=Gone())
    assert result.error.exit_code == 1 and "stage 'student': val.jpg cannot be read; the last good artifact is " in result.error.message
    assert stages.runs[-1] == "student"
    finished, again, _ = go(tmp_path)
    assert finished.ok and "student" not in again.runs and "pruned" in again.runs


def test_a_stage_that_writes_no_model_fails(tmp_path):
    class Nothing(Stages):
        def run(self, parent, config, context):
            pass

    result, *_ = go(tmp_path, stages=Nothing())
    assert "has no config.json" in result.error.message
    assert not result.rows


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("x")
    result, *_ = go(tmp_path, out="taken")
    assert result.error.exit_code == 2 and "is a file, not a folder" in result.error.message


# ---- kills and other processes

CHILD = """
import json, os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_pipeline as t
from compress import pipeline, recipe
from compress.context import Progress
from compress.data import CaptionSet
from compress.data.captions import Example

folder, where, point = Path({folder!r}), {where!r}, {point!r}

def die(name, at):
    if name == where and at == point:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == where and point == "wait-" + at:
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)

class Stages(t.Stages):
    def run(self, parent, config, context):
        die(context.stage.name, "start")
        context.work.joinpath("step").write_text("1")
        super().run(parent, config, context)
        die(context.stage.name, "made")

class Evaluation(t.Evaluation):
    def measure(self, artifact, against, context):
        die(context.stage.name, "measure")
        return super().measure(artifact, against, context)
    def baseline(self, artifact, context):
        die("nearest", "measure")
        return super().baseline(artifact, context)

wanted = recipe.read_recipe(folder / "chain.yaml")
rename = os.rename
def renaming(source, target):
    die(Path(source).name, "rename")
    rename(source, target)
os.rename = renaming
result = pipeline.run(wanted, folder / {out!r}, Progress(), data=t.captions(), stages=Stages(), evaluation=Evaluation())
if result.error:
    result.error.show()
    sys.exit(result.error.exit_code)
print(json.dumps([row["name"] for row in result.rows]))
"""


def child(folder: Path, where="", point="", out="runs/chain") -> subprocess.Popen:
    code = CHILD.format(tests=str(ROOT / "tests"), folder=str(folder), where=where, point=point, out=out)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


@pytest.mark.parametrize(
    ("where", "point"),
    [("teacher", "start"), ("nearest", "measure"), ("student", "made"), ("pruned", "measure"), ("model", "rename")],
)
def test_sigkill_anywhere_then_the_same_command_goes_on(tmp_path, where, point):
    (tmp_path / "calm").mkdir()
    calm, *_ = go(tmp_path / "calm")
    read(tmp_path)
    killed = child(tmp_path, where, point)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    done = [path for path in (tmp_path / "runs/.cache").iterdir() if len(path.name) == 64 and path.is_dir()]
    assert all((path / "metrics.json").is_file() and (path / "lock.json").is_file() for path in done)  # whole, or under no such name
    resumed, stages, _ = go(tmp_path)
    assert resumed.ok
    if point == "measure":
        assert where not in stages.runs  # made before the kill: only measured now
    for row in resumed.rows[1:]:
        made, undisturbed = (Artifact(folder / "runs/chain" / row["artifact"]) for folder in (tmp_path, tmp_path / "calm"))
        assert made.check().digest() == undisturbed.digest()
    assert [row["lock"] for row in resumed.rows] == [row["lock"] for row in calm.rows]
    assert {path.name for path in (tmp_path / "runs/.cache").iterdir()} == {row["lock"] for row in resumed.rows}


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


def test_one_process_writes_a_run(tmp_path):
    read(tmp_path)
    first = child(tmp_path, "teacher", "wait-start")
    wait_for(tmp_path / "waiting")
    second = child(tmp_path)
    _, error = second.communicate(timeout=60)
    assert second.returncode == 1
    assert error == f"lightcap: process {first.pid} is writing this run now; wait for it, or run elsewhere with --out DIR\n"
    (tmp_path / "go").touch()
    output, _ = first.communicate(timeout=60)
    assert json.loads(output) == NAMES


def test_two_runs_make_a_shared_artifact_once(tmp_path):
    read(tmp_path)
    first = child(tmp_path, "teacher", "wait-start")
    wait_for(tmp_path / "waiting")
    second = child(tmp_path, out="runs/other")
    for line in second.stderr:
        if "waiting" in line:
            assert line == f"[1/5] teacher: process {first.pid} is making it; waiting\n"
            break
    (tmp_path / "go").touch()
    output, _ = first.communicate(timeout=60)
    rest = second.communicate(timeout=60)[1]
    assert json.loads(output) == NAMES and second.returncode == 0
    assert "[1/5] teacher: cached" in rest
    rows = [ledger.read(tmp_path / "runs" / name / "ledger.jsonl") for name in ("chain", "other")]
    assert rows[0] == rows[1]
