"""What a row compares an artifact with, and that its numbers are the artifact's own."""

import json

import numpy as np
import pytest
import tiny_captioner as tiny
import torch
from stage_context import context

from compress import cost, data, evaluate, latency, metrics, profile
from compress.artifact import Artifact
from compress.config import Data, Distill, Scst, Stage, Student
from compress.context import Progress
from compress.data import CaptionSet, Example
from compress.errors import ModelError, StageError
from compress.ledger import captions_file
from compress.training.start import new_captioner, write_captioner
from students.lightcap import preset


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
    for name in ("teacher", "student"):
        evaluate.measure(artifacts[name], None, context(tmp_path, captions, name=name, artifacts=artifacts))
    for name, value in (("teacher", 10.0), ("student", 30.0)):  # untrained, all of them say nothing that a reference says
        file = captions_file(artifacts[name].path, "val")
        file.write_text(json.dumps([item | {"cider": value} for item in json.loads(file.read_text())]))
    timed, real = [], latency.latency

    def looked(artifact, parent, pictures):
        timed.append(parent)
        return real(artifact, parent, pictures[:2])

    monkeypatch.setattr(evaluate, "latency", looked)
    row = evaluate.measure(artifacts["mine"], artifacts[accuracy_of], context(tmp_path, captions, stage=stage, artifacts=artifacts))
    assert accuracy_of == "teacher" and row["delta_cider"] == pytest.approx(row["cider"] - 10.0, abs=1e-3)
    assert timed == [artifacts[time_of]] and row["parent_latency_ms"]["runtime"] == "torch"
    captions_file(artifacts["mine"].path, "val").unlink()
    sizes = evaluate.sizes(artifacts["mine"], context(tmp_path, captions, stage=stage, artifacts=artifacts))
    assert sizes.items() >= cost.costs(artifacts["mine"]).items() and sizes["latency_ms"]["runtime"] == "torch" and "cider" not in sizes
    assert timed[1:] == [artifacts.get(stage.parent)] and not captions_file(artifacts["mine"].path, "val").exists()


def test_captions_of_weights_that_diverged_are_no_result(tmp_path):
    captions = data.load(Data(train_images=8, val_images=3))
    model, tokenizer, settings = new_captioner(Student(preset="tiny"), "tiny", None, captions.image(captions.examples[0]).shape[0], 0.0, 0)
    with torch.no_grad():
        model.fusion.norm.weight.fill_(float("nan"))
    write_captioner(tmp_path, model.eval(), tokenizer, settings)
    with pytest.raises(StageError, match="the log-probabilities of 3 captions, the first of .*, are not finite; lower learning_rate"):
        evaluate.measure(Artifact(tmp_path), None, context(tmp_path, captions, name="teacher"))
    with pytest.raises(ModelError, match="the log-probabilities of 3 captions, the first of .*, are not finite: its weights are damaged"):
        evaluate.evaluate(Artifact(tmp_path), captions.split("val"), 2, Progress(quiet=True))


def test_the_baseline_says_what_the_nearest_training_picture_is_called(tmp_path):
    """Val's pictures have the colours of train's, in another order; each colour has its own caption."""
    order = [5, 2, 7, 0, 6, 1, 4, 3]
    pictures = {"train": tiny.pictures(8), "val": [tiny.pictures(8, seed=5)[i] for i in order]}
    examples = [Example(str(i), "train", (tiny.caption(i), "another")) for i in range(8)]
    examples += [Example(str(i), "val", (tiny.caption(colour),)) for i, colour in enumerate(order)]
    rows = CaptionSet(tuple(examples), "0" * 64, "colours", reader=lambda example: pictures[example.split][int(example.image_id)])
    row = evaluate.baseline(tiny.artifact(tiny.build(), tmp_path / "float"), context(tmp_path, rows))
    texts = [tiny.caption(colour) for colour in order]
    assert row["cider"] == pytest.approx(metrics.score(texts, [[text] for text in texts]).cider) and row["split"] == "val"


def test_what_is_measured_is_what_is_said(tmp_path):
    """Narrowed and in batches, from stored features; and picture by picture over the whole vocabulary."""
    model = tiny.build(steps=60)
    model.heads.bias.data[tiny.tokenizer().token_to_id("street")] = -100.0  # as of a piece that no training caption held
    made = tiny.artifact(model, tmp_path / "float")
    pictures = tiny.pictures(6, seed=3)
    rows = CaptionSet(tuple(Example(str(i), "val", (tiny.caption(i),)) for i in range(6)), "1" * 64, "colours",
                      reader=lambda example: pictures[int(example.image_id)])
    measured = evaluate.captions(made, rows, 5, tmp_path / "cache", Progress(quiet=True))
    alone = evaluate.caption_of_image(made, 5)
    assert len({text for text, _ in measured}) > 2
    for picture, (text, logprob) in zip(pictures, measured, strict=True):
        mine, total = alone(picture)
        assert text == mine and "street" not in text and logprob == pytest.approx(total, abs=0.05)


def test_times_are_told_apart(monkeypatch, tmp_path):
    mine, parent = (Artifact(tmp_path / name) for name in ("mine", "parent"))
    monkeypatch.setattr(latency, "timed_torch", lambda item, tokens: lambda picture: item.path.name)
    monkeypatch.setattr(cost, "interleaved", lambda works, rounds: [[{"mine": 1.0, "parent": 9.0}[work(0)]] * rounds for work in works])
    found = latency.latency(mine, parent, np.zeros((3, 8, 8, 3), np.uint8))
    assert (found["latency_ms"]["p50"], found["parent_latency_ms"]["p50"]) == (1.0, 9.0)
    assert latency.latency(mine, None, np.zeros((3, 8, 8, 3), np.uint8))["parent_latency_ms"] is None


def test_ciders_are_those_of_its_file_or_are_measured_where_that_is_of_other_images(tmp_path):
    """Another run of a shared artifact may have measured it on fewer. Either way they are rounded alike: equal captions lose nothing."""
    made, val = tiny.artifact(tiny.build(steps=120), tmp_path / "made"), tiny.captioned("val")
    measured = evaluate.ciders(made, val, tmp_path, Progress(quiet=True))
    assert measured.max() > 1 and (measured == measured.round(4)).all()
    written = [{"image": example.image_id, "caption": "", "cider": 7.0 + number} for number, example in enumerate(val.examples)]
    captions_file(made.path, "val").write_text(json.dumps(written))
    assert evaluate.ciders(made, val, tmp_path, Progress(quiet=True)).tolist() == [item["cider"] for item in written]
    captions_file(made.path, "val").write_text(json.dumps(written[1:]))
    assert evaluate.ciders(made, val, tmp_path, Progress(quiet=True)).tolist() == measured.tolist()


def test_bit_operations_are_those_of_the_precision(tmp_path):
    """8 x 8 bits a product in INT8, 32 x 32 in float; of a model with parts in float they are not known."""
    made, found = tiny.artifact(tiny.build(), tmp_path / "float"), {}
    config = json.loads((made.path / "config.json").read_text())
    for name, quantized in (("float", None), ("int8", {"scheme": "static"}), ("mixed", {"scheme": "static", "float_parts": ["heads"]})):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config | ({} if quantized is None else {"quantized": quantized})))
        found[name] = cost.costs(Artifact(tmp_path / name))
    assert found["float"]["gbops_caption"] == pytest.approx(1024 * found["float"]["gmacs_caption"], rel=0.01)
    assert found["int8"]["gbops_caption"] == pytest.approx(64 * found["float"]["gmacs_caption"], rel=0.2)
    assert found["mixed"]["gbops_caption"] is None and found["mixed"]["gmacs_caption"] == found["float"]["gmacs_caption"]


def test_a_profile_counts_as_many_pieces_as_it_is_asked_for():
    found = [profile.profile("tiny", tokens)["gmacs_caption"] for tokens in (3, 12)]
    assert found == [cost.count_macs(preset("tiny"), tokens).caption / 1e9 for tokens in (3, 12)] and found[0] < found[1]
