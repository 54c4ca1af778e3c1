"""What a plan says that stages will compute: closed forms against what is dispatched, and sums that can be done by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from compress import estimate
from compress.cost import counted
from compress.data import CaptionSet
from compress.data.captions import Example
from compress.estimate import Amount, language
from compress.recipe import read_recipe
from compress.training.batches import Captions, Masking, pack, pack_masked
from compress.training.losses import caption_loss
from compress.training.softmax import logits_at
from students.lightcap import LightCap, preset

RECIPE = """
student: {preset: tiny, heads: 2}
stages:
  - train: {as: teacher, preset: tiny, epochs: 2}
  - train: {as: tuned, from: teacher, encoder: tuned, epochs: 3}
  - distill: {as: student, teachers: [teacher, teacher], epochs: 4}
  - distill: {as: matched, teachers: teacher, match: [tokens, hidden], match_epochs: 1, epochs: 4}
  - scst: {epochs: 1, samples: 5}
  - prune: {as: pruned, macs: 0.5, recover_epochs: 2, recover_encoder_epochs: 1}
  - prune: {as: language, from: student, parts: fusion, macs: 0.9, recover_epochs: 2}
  - quantize: {calibration_images: 7}
  - concepts: {as: extractor, preset: tiny, inner: 32, epochs: 2}
  - concepts: {as: finder, preset: tiny, inner: 32, pieces: 8}
  - train: {as: read, from: finder, encoder: tuned, epochs: 3}
  - prune: {as: smaller, from: read, macs: 0.9}
"""
AMOUNT = Amount(images=30, captions=2.0, words=4.0, vocabulary=9, evaluated=0)


@pytest.fixture
def data() -> CaptionSet:
    words = ("a red ring here", "One small green star")
    examples = [Example(f"{i}.jpg", "train", (words[0], f"{words[1]}")) for i in range(30)]
    return CaptionSet((*examples, Example("v.jpg", "val", words)), "f" * 64, "rings")


def planned(tmp_path, data, *settings) -> dict[str, float]:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    return {name: value * 1e12 for name, value in estimate.tmacs(read_recipe(path, settings), data).items()}


@pytest.mark.parametrize(("concepts", "heads"), [(0, 1), (0, 3), (6, 3)])
def test_a_pass_is_what_is_dispatched(concepts, heads):
    """Training's forward pass over two images of three captions of four words, counted by torch"""
    config = dataclasses.replace(preset("tiny", vocabulary=50, heads=heads), concepts=concepts)
    batch = pack(Captions.of([[[2, 7, 8, 9, 10, 3]] * 3] * 2), range(2))
    with torch.device("meta"):
        model = LightCap(config).train()
    model.to_empty(device="cpu")
    found = torch.ones(2, concepts, dtype=torch.long) if concepts else None

    def forward() -> None:
        states = model.states(torch.zeros(2, 25, 128), batch.tokens, batch.positions, batch.mask(config.prefix), concepts=found)
        real = batch.targets >= 0
        mean = model.heads.branch_states(states[real]).mean(0)
        caption_loss(logits_at(mean, model.word, model.heads.bias, batch.targets[real].unsqueeze(1)), 0.1)

    assert sum(counted(forward)) == 2 * language(config, Amount(2, 3.0, 4.0, 50, 0), 3.0, 4.0)


@pytest.mark.parametrize("probes", [False, True])
def test_a_pass_of_a_masked_model_is_what_is_dispatched(probes):
    """Of five pieces one is masked and predicted; or each is asked for under a [MASK] of its own."""
    config = dataclasses.replace(preset("tiny", vocabulary=50, heads=1), mask_piece=4)
    captions = Captions.of([[[2, 7, 8, 9, 10, 3]] * 3] * 2)
    masked = pack_masked(captions, range(2), Masking(4, 50), np.random.default_rng(1))
    batch = pack(captions, range(2)).probing(4) if probes else masked
    with torch.device("meta"):
        model = LightCap(config).train()
    model.to_empty(device="cpu")

    def forward() -> None:
        states = model.states(torch.zeros(2, 25, 128), batch.tokens, batch.positions, batch.mask(config.prefix))
        model.heads(states[batch.targets >= 0], model.word)

    assert sum(counted(forward)) == 2 * language(config, Amount(2, 3.0, 4.0, 50, 0), 3.0, 4.0, probes=probes)


def test_amounts_are_of_the_splits(data):
    assert Amount.of(data, "val") == Amount(30, 2.0, 4.0, 8, 1)
    assert Amount.of(data, "train").evaluated == 30


def test_epochs_are_passes(tmp_path, data):
    """One more epoch is 30 images more, each three passes; a tuned encoder's are among them."""
    spent = planned(tmp_path, data)
    config = preset("tiny", vocabulary=8, heads=2)
    once = language(config, Amount(30, 2.0, 4.0, 8, 1), 2.0, 4.0)
    more = {name: planned(tmp_path, data, f"{name}.epochs={epochs}")[name] - spent[name] for name, epochs in (("teacher", 3), ("tuned", 4))}
    assert more["teacher"] == pytest.approx(30 * 3 * once)
    encoder = (more["tuned"] - more["teacher"]) / 90
    assert encoder == pytest.approx(estimate.count_macs(config).encoder)
    finding = planned(tmp_path, data, "read.concept_weight=0.1")["read"] - spent["read"]
    assert finding == pytest.approx(30 * 3 * 3 * estimate.count_macs(dataclasses.replace(config, concepts=8, alignment=(32, 384))).concepts)
    tuned = planned(tmp_path, data, "extractor.encoder=tuned")["extractor"]
    assert tuned - spent["extractor"] == pytest.approx(30 * (2 * 3 - 1) * encoder)  # three a picture in both epochs, instead of one ahead
    assert spent["matched"] - planned(tmp_path, data, "matched.match=tokens")["matched"] == pytest.approx(30 * once)
    two, each = spent["student"], language(config, Amount(30, 2.0, 4.0, 8, 1), 2.0, 4.0, 2)
    assert planned(tmp_path, data, "student.epochs=5")["student"] - two == pytest.approx(30 * 3 * each)
    assert planned(tmp_path, data, "student.teachers=[teacher]")["student"] == pytest.approx(two - 30 * once)
    seen = planned(tmp_path, data, "matched.flip=true")["matched"]  # features and the teacher's tokens in each pass, not once ahead
    assert seen - spent["matched"] == pytest.approx(30 * (4 - 1) * (encoder + once))
    moved = planned(tmp_path, data, "matched.encoder=tuned")["matched"]  # two passes backward, and the teacher's own encoder
    assert moved - seen == pytest.approx(30 * 4 * (2 + 1) * encoder)
    finished = tmp_path / "f.yaml"
    finished.write_text("student: {preset: tiny, tokenizer: english}\nstages:\n  - pretrained: {as: git, model: x/y}\n"
                        "  - distill: {as: student, teachers: git, epochs: 4, init: random}\n")
    as_they_are, cut = (estimate.tmacs(read_recipe(finished, more), data)["student"] * 1e12 for more in ((), ("student.crop=0.1",)))
    assert cut - as_they_are == pytest.approx(30 * (4 - 1) * encoder)  # encoded in each pass
    assert spent["pruned"] - spent["language"] == pytest.approx(30 * 3 * encoder)
    again = planned(tmp_path, data, "pruned.steps=3")["pruned"] - spent["pruned"]  # each step recovers, from features computed anew
    assert again == pytest.approx(2 * 30 * (encoder + 3 * 2 * each + 3 * encoder))
    found = [planned(tmp_path, data, f"smaller.recover_concepts_epochs={epochs}")["smaller"] for epochs in (4, 0)]
    extractor = estimate.count_macs(dataclasses.replace(config, concepts=8, alignment=(32, 384))).concepts
    assert found[0] - found[1] == pytest.approx(30 * 4 * (3 + 1) * extractor)  # the parent finds them beside it
    alone = [planned(tmp_path, data, "smaller.parts=[fusion]", f"smaller.recover_concepts_epochs={epochs}")["smaller"] for epochs in (4, 0)]
    assert alone[0] == alone[1]  # what it finds cannot have changed
    tuned = planned(tmp_path, data, "quantize.tune_epochs=1")["quantize"]
    assert tuned > spent["quantize"] == planned(
        tmp_path, data, "quantize.tune_epochs=1", "quantize.trials=2", "quantize.max_drop_cider=1")["quantize"]
    assert planned(tmp_path, data, "quantize.calibration_images=8")["quantize"] - spent["quantize"] == pytest.approx(
        estimate.count_macs(config).caption
    )
    assert planned(tmp_path, data, "scst.samples=10")["scst"] > 1.5 * spent["scst"] - 31 * encoder
    stored, anew = (planned(tmp_path, data, "scst.epochs=3", f"scst.crop={crop}")["scst"] for crop in (0.0, 0.1))
    assert anew - stored == pytest.approx(30 * 2 * encoder)  # disturbed pictures are encoded in each of three passes, not once
    stored, anew = (planned(tmp_path, data, f"pruned.crop={crop}")["pruned"] for crop in (0.0, 0.1))
    assert anew - stored == pytest.approx(30 * encoder)  # the parent's encoder runs beside the pruned one
