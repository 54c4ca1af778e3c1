"""What a row compares an artifact with."""

from pathlib import Path

import pytest

from compress import data, evaluate
from compress.artifact import Artifact
from compress.config import Data, Distill, Recipe, Scst, Stage, Student
from compress.context import Context, Progress
from compress.training.start import new_captioner, write_captioner


@pytest.mark.parametrize(
    ("stage", "accuracy_of", "time_of"),
    [
        (Stage("scst", "mine", "student", Scst(), "teacher"), "teacher", "student"),
        (Stage("distill", "mine", None, Distill(teachers=("teacher",)), "teacher"), "teacher", "teacher"),
    ],
)
def test_accuracy_is_compared_with_against_and_time_with_the_parent(tmp_path, monkeypatch, stage, accuracy_of, time_of):
    captions = data.load(Data(train_images=8, val_images=3))
    artifacts = {}
    for number, name in enumerate(("teacher", "student", "mine")):
        (tmp_path / name).mkdir()
        size = captions.image(captions.examples[0]).shape[0]
        model, tokenizer, settings = new_captioner(Student(preset="tiny"), "tiny", None, size, 0.0, number)
        write_captioner(tmp_path / name, model.eval(), tokenizer, settings)
        artifacts[name] = Artifact(tmp_path / name)
    recipe = Recipe("x", 17, Data(), Student(preset="tiny"), (stage,), Path("x.yaml"))

    def context(of: Stage) -> Context:
        return Context(recipe, of, captions, 17, 1, tmp_path, tmp_path, tmp_path / "cache", artifacts, Progress(quiet=True))

    for name in ("teacher", "student"):
        evaluate.measure(artifacts[name], None, context(Stage("train", name, None, None)))
    timed, latency = [], evaluate.latency

    def looked(artifact, parent, pictures):
        timed.append(parent)
        return latency(artifact, parent, pictures[:2])

    monkeypatch.setattr(evaluate, "latency", looked)
    row = evaluate.measure(artifacts["mine"], artifacts[accuracy_of], context(stage))
    before = evaluate.ciders(artifacts[accuracy_of], captions.split("val"), tmp_path / "cache", Progress(quiet=True))
    assert row["delta_cider"] == pytest.approx(row["cider"] - before.mean(), abs=1e-3)
    assert timed == [artifacts[time_of]] and row["parent_latency_ms"]["runtime"] == "torch"
