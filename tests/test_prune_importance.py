"""Importance is a gate's derivative, or one of the other measures that a recipe names."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from prunable import with_concepts
from torch import nn

from compress.config import Prune
from compress.stages.prune import channels
from compress.training.batches import IGNORED, pack

importance = importlib.import_module("compress.stages.prune.importance")  # the package names its function alike


def test_importance_is_the_derivative_at_a_gate(pruning, monkeypatch):
    """By finite differences of each picture's loss, with gates on all that reads a channel."""
    model, tokenizer, preprocessing, _, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 2)
    monkeypatch.setattr(importance, "IMAGES", 4)
    wanted = channels.units(model, ("encoder", "fusion", "hidden"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config, here = Prune(macs=0.7), context("a")
    scores = importance.importance(model, tokenizer, preprocessing, wanted, config, 17, here)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {unit: tuple(score.shape) for unit, score in scores.items()} == {unit: (unit.width,) for unit in wanted}

    corpus = importance.corpus(model, tokenizer, preprocessing, here, tuned=True)
    model.narrow(corpus.keep)
    batches = [corpus.batches(4, 17)(step) for step in range(2)]

    def losses(unit: channels.Unit, channel: int, gate: float) -> torch.Tensor:
        width = model.get_submodule(unit.name).head_dim if unit.kind == "head" else 1
        places = slice(channel * width, (channel + 1) * width)

        def gated(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[(slice(None), places) if unit.kind == "conv" else (..., places)] *= gate
            return x

        if unit.kind == "hidden":
            norms = [module for module in [*model.fusion.modules(), *model.heads.modules()] if isinstance(module, nn.LayerNorm)]
            handles = [norm.register_forward_hook(lambda _, inputs, out: gated(out)) for norm in norms]
        else:
            readers = [model.get_submodule(name) for name in unit.readers]
            handles = [reader.register_forward_pre_hook(lambda _, inputs: (gated(inputs[0]),)) for reader in readers]
        found = []
        for batch in batches:
            with torch.no_grad():
                grid = corpus.grid_of(model, batch.images)
                states = model.states(grid, batch.tokens, batch.positions, batch.mask(grid.shape[1]))
            for states_of, targets in zip(states, batch.targets, strict=True):
                real = targets != IGNORED
                logits = model.heads(states_of[real], model.word).double()
                found.append(F.cross_entropy(logits, targets[real], label_smoothing=config.label_smoothing, reduction="sum").detach())
        for handle in handles:
            handle.remove()
        return torch.stack(found)

    eps, pieces = 0.01, sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    coupled = next(unit for unit in wanted if len(unit.writers) == 2)
    assert len(coupled.readers) > 1 and all(unit.readers for unit in wanted[:-1])
    for unit in [wanted[0], wanted[3], coupled, wanted[-5], wanted[-2], wanted[-1]]:
        for channel in {int(scores[unit].argmax()), 0}:
            slopes = (losses(unit, channel, 1 + eps) - losses(unit, channel, 1 - eps)) / (2 * eps)
            assert len(slopes) == 8
            assert float(scores[unit][channel]) == pytest.approx(float(slopes.square().sum()) / (2 * pieces), rel=0.05, abs=1e-7), unit


def test_importance_by_distillation_is_the_curvature_of_the_kl(pruning, monkeypatch):
    """The KL divergence from the model to itself with one gate moved by eps, over eps squared; means over many draws."""
    model, tokenizer, preprocessing, _, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 400)
    monkeypatch.setattr(importance, "IMAGES", 1)
    unit = channels.units(model, ("fusion",))[1]
    here = context("a")
    corpus = importance.corpus(model, tokenizer, preprocessing, here)
    images = len(corpus.captions.images)
    monkeypatch.setattr(type(corpus), "batches", lambda self, *_: lambda step: pack(self.captions, [0]))
    scores = importance.importance(model, tokenizer, preprocessing, [unit], Prune(macs=0.7, importance="distillation"), 17, here)[unit]
    assert images > 1 and unit.kind == "head" and float(scores.min()) > 0
    model.narrow(corpus.keep)
    batch, layer = pack(corpus.captions, [0]), model.get_submodule(unit.name)

    def logs(head: int, gate: float) -> torch.Tensor:
        places = slice(head * layer.head_dim, (head + 1) * layer.head_dim)

        def before(_, inputs):
            x = inputs[0].clone()
            x[..., places] *= gate
            return (x,)

        handle = layer.output.register_forward_pre_hook(before)
        with torch.no_grad():
            grid = corpus.grid_of(model, batch.images)
            states = model.states(grid, batch.tokens, batch.positions, batch.mask(grid.shape[1]))
            said = model.heads(states[batch.targets != IGNORED], model.word).double().log_softmax(-1)
        handle.remove()
        return said

    eps = 0.05
    for head in range(unit.width):
        p, q = logs(head, 1.0), logs(head, 1 + eps)
        moved = float((p.exp() * (p - q)).sum(-1).mean()) / eps**2  # by the whole gate, were the divergence a parabola
        assert float(scores[head]) == pytest.approx(moved, rel=0.25), head


def test_magnitude_is_of_folded_weights(pruning):
    model, tokenizer, preprocessing, _, context = pruning
    wanted = channels.units(model, ("encoder", "fusion"))
    config, here = Prune(macs=0.7, importance="magnitude"), context("a")
    before = importance.importance(model, tokenizer, preprocessing, wanted, config, 17, here)
    assert all(score.shape == (unit.width,) for unit, score in before.items())
    assert all(float(score.mean()) == pytest.approx(max(1, len(unit.writers))) for unit, score in before.items())
    conv = next(unit for unit in wanted if unit.kind == "conv")
    norm = importance.norms_behind(model)[conv.name]
    layer = model.fusion.layers[0]
    with torch.no_grad():
        model.get_submodule(conv.name).weight *= 10  # a norm takes it back
        norm.running_var *= 100
        layer.down.weight[:, 3] *= 7
    after = importance.importance(model, tokenizer, preprocessing, wanted, config, 17, here)
    torch.testing.assert_close(after[conv], before[conv], rtol=1e-3, atol=1e-3)
    ffn = next(unit for unit in wanted if unit.kind == "ffn" and unit.name == "fusion.layers.0")
    ratio = after[ffn] / before[ffn]
    assert float(ratio[3] / ratio[0]) == pytest.approx(7, rel=1e-4)

    between = next(unit for unit in wanted if len(unit.writers) == 2)
    sizes = []
    for name in between.writers:
        norm = importance.norms_behind(model)[name]
        folded = model.get_submodule(name).weight.flatten(1) * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]
        sizes.append(folded.norm(dim=1) / folded.norm(dim=1).mean())
    torch.testing.assert_close(after[between], sum(sizes).detach())


def test_a_channel_of_the_concept_extractor_matters_by_the_variance_it_gives(pruning, monkeypatch):
    model, tokenizer, preprocessing, _, context = pruning
    model = with_concepts(model)
    with torch.no_grad():
        model.alignment.first.bias.fill_(1.0)  # no channel is closed everywhere
        model.alignment.first.weight[3].zero_()  # constant
        model.alignment.second.weight[:, 5] *= 100
    monkeypatch.setattr(importance, "BATCHES", 1)
    wanted = channels.units(model, ("fusion", "concepts"))
    scores = importance.importance(model, tokenizer, preprocessing, wanted, Prune(macs=0.7), 17, context("a"))
    assert wanted[-1].kind == "concept" and scores[wanted[-1]].argmin() == 3 and scores[wanted[-1]].argmax() == 5
    assert all(float(scores[unit].min()) >= 0 for unit in wanted)
    norms = importance.magnitude(model, wanted[-1], {})
    assert float(norms.mean()) == pytest.approx(1) and norms.argmin() == 3 and norms.argmax() == 5
