"""What cutting costs, measured: of a unit's half, and of a whole layer."""

import copy
import dataclasses
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from prunable import build, cut, idle, outputs, silence

from compress.config import Prune
from compress.stages import prune
from compress.stages.prune import channels, prices, sensitivity
from compress.training.batches import IGNORED
from students.lightcap import LightCap

# The package names its functions alike.
importance, repair = (importlib.import_module(f"compress.stages.prune.{name}") for name in ("importance", "repair"))


def test_the_layer_that_does_nothing_leaves_first():
    model = build(layers=3)
    idle(model, 1)
    before = outputs(model)[1]
    assert sensitivity.least_layers(model, lambda cut: float((outputs(cut)[1] - before).square().mean()), 2) == [0, 2]
    without = sensitivity.with_layers(model, [0, 2])
    assert without.config.layers == 2 and len(model.fusion.layers) == 3
    for mine, theirs in zip(outputs(without), outputs(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_measured_is_how_far_captions_move(pruning):
    """By hand: the KL divergence over the same batches, with the half silenced; repaired where it is the encoder's. A unit that does
    nothing moves nothing, and has the least factor."""
    model, tokenizer, preprocessing, _, context = pruning
    idle(model, 0)
    here = context("a")
    narrow, moved = sensitivity.measured(model, tokenizer, preprocessing, 17, here)
    data_of = importance.corpus(model, tokenizer, preprocessing, here, tuned=True)
    batch_of = data_of.batches(importance.IMAGES, 17)

    @torch.no_grad()
    def by_hand(model: LightCap) -> float:
        found = []
        for step in range(3):  # 40 images in batches of 16
            batch, said = batch_of(step), []
            for one in (narrow, model):
                states = one.states(data_of.grid_of(one, batch.images), batch.tokens, batch.positions, batch.mask(one.config.prefix))
                said.append(one.heads(states[batch.targets != IGNORED], one.word).log_softmax(-1))
            found.append(F.kl_div(said[1], said[0], log_target=True, reduction="none").sum(-1))
        return float(torch.cat(found).mean())

    assert moved(narrow) == pytest.approx(0, abs=1e-7)
    source = torch.Generator().manual_seed(2)
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, ("encoder", "fusion"))}
    savings = prices.savings(model, prices.PRICES["macs"])
    mend = repair.Repair.of(model, preprocessing, ("encoder", "fusion"), 17, here)
    moves, factors = sensitivity.sensitivities(narrow, moved, scores, 8, savings, mend, ("parent", 17), here)
    less = 0
    for unit in (unit for unit in scores if (unit.kind, unit.name) in factors):
        order = channels.blocks({unit: scores[unit]}, 8, savings)
        half = order[: max(1, len(order) // 2)]
        silenced = copy.deepcopy(narrow)
        silence(silenced, half)
        move = moves[f"{unit.name} {unit.kind}"]
        if unit.kind == "conv":
            less += move < by_hand(silenced)
        else:
            assert move == pytest.approx(by_hand(silenced), abs=2e-4)
        expected = float(torch.cat([scores[unit][list(block.channels)] for block in half]).sum())
        assert factors[unit.kind, unit.name] == pytest.approx(max(move, sensitivity.LEAST) / expected, rel=1e-5)
    assert less > 4 and moves["fusion.layers.0 ffn"] == pytest.approx(0, abs=1e-5) and max(moves.values()) > 0.01

    def never(cut: LightCap) -> float:
        raise AssertionError("measured again")

    halved = {unit: saving / 2 for unit, saving in savings.items()}  # another target in the same measure
    assert sensitivity.sensitivities(narrow, never, scores, 8, halved, mend, ("parent", 17), here) == (moves, factors)
    reversed_ = {unit: -score for unit, score in scores.items()}  # other halves leave
    elsewhere = dataclasses.replace(here, data=dataclasses.replace(here.data, marks={"train": "other pictures"}))
    for key, ranking, where in ((("parent", 18), scores, here), (("parent", 17), reversed_, here), (("parent", 17), scores, elsewhere)):
        with pytest.raises(AssertionError, match="measured again"):
            sensitivity.sensitivities(narrow, never, ranking, 8, savings, mend, key, where)


def test_layers_and_ratios_of_the_stage(pruning, monkeypatch):
    model, tokenizer, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    config = Prune(macs=0.7, layers=1, ratios="sensitivity", steps=2, batch_images=40, recover_epochs=1, recover_encoder_epochs=0.1)
    here = context("a")
    pruned = cut(parent, config, here)
    assert pruned.config.layers == 1 and prices.macs(pruned) / prices.macs(model) <= 0.7
    rises = json.loads((here.output / "sensitivity.json").read_text())
    assert {"fusion.layers.0 ffn", "encoder.stem.0 conv"} <= set(rises)


def test_a_layer_can_be_all_that_leaves(pruning, monkeypatch):
    """An encoder that lost nothing has nothing to recover."""
    model, _, _, parent, context = pruning
    here = context("a")
    monkeypatch.setattr(prune, "recover_encoder", None)
    pruned = cut(parent, Prune(params=0.99, layers=1, recover_epochs=0, batch_images=40), here)
    assert pruned.config.layers == 1 and not pruned.config.shapes
    kept = pruned.fusion.layers[0].state_dict()
    assert any(all(torch.equal(kept[name], value) for name, value in layer.state_dict().items()) for layer in model.fusion.layers)
