"""What is left is repaired by a few pictures, and recovered by its parent."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from prunable import build, cut, ranked, with_concepts

from compress.artifact import Artifact
from compress.config import Prune
from compress.stages.prune import channels, prices, sensitivity
from compress.training.features import device, normalised, pixels
from compress.training.mentions import concept_loss
from compress.training.start import write_captioner
from students.lightcap import LightCap
from students.lightcap.encoder import preprocessor

# The package names its functions alike.
importance, repair = (importlib.import_module(f"compress.stages.prune.{name}") for name in ("importance", "repair"))


@pytest.mark.parametrize("encoder", ["resnet-small", "clip-small", "efficientnet-lite0"])
def test_norms_give_each_channel_that_stays_the_mean_and_spread_of_before(clip_small, encoder):
    """Seen from outside: by the outputs of norms, whose channels that stay are found by what the norms themselves say (their weights)."""
    model = build(encoder)
    norms = repair.norms_of(model)
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.linspace(0.6, 1.4, len(norm.weight))[torch.randperm(len(norm.weight))])  # no two are alike
    size = model.config.image_size
    pictures = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))
    order = ranked(model, parts=("encoder",))
    carried, chosen = repair.carrying(model, pictures), order[: len(order) // 2]
    cut = channels.remove(model, chosen)
    plain, before = cut.encode(pictures), model.encode(pictures)
    repair.repair(cut, channels.remove(carried, chosen), pictures)

    def outputs_of(model: LightCap) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        found = []
        hooks = [
            norm.register_forward_hook(lambda norm, _, y: found.append((norm.weight, y.mean((0, 2, 3)), y.std((0, 2, 3)))))
            for norm in repair.norms_of(model)
        ]
        with torch.no_grad():
            model.encode(pictures)
        for hook in hooks:
            hook.remove()
        return found

    fewer = 0
    for (weight, mean, deviation), (weights, means, deviations) in zip(outputs_of(cut), outputs_of(model), strict=True):
        stays = [int((weights == one).nonzero()) for one in weight]
        fewer += len(stays) < len(weights)
        torch.testing.assert_close(mean, means[stays], atol=1e-3, rtol=1e-3)
        close = (deviation - deviations[stays]).abs() < 0.01 + 0.01 * deviations[stays]
        assert close.float().mean() > 0.9, (deviation, deviations[stays])  # but for some that are nearly constant: repair.MOST
    assert fewer > 2
    assert F.mse_loss(cut.encode(pictures), before) < F.mse_loss(plain, before)


def test_norms_of_an_unpruned_encoder_stay_as_they_are():
    model = build()
    pictures = torch.randn(4, 3, model.config.image_size, model.config.image_size, generator=torch.Generator().manual_seed(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    repair.repair(model, repair.carrying(model, pictures), pictures)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=1e-5)


def test_the_stage_repairs_what_it_cuts(pruning, monkeypatch):
    """Without recovery, the grid of the same cut is nearer to the parent's with repaired norms than with those that it had."""
    model, _, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    config = Prune(macs=0.6, parts=("encoder",), batch_images=40, recover_epochs=0.0, recover_encoder_epochs=0.0)
    here = context("a")
    repaired = cut(parent, config, here)
    monkeypatch.setattr(repair, "repair", lambda *_: None)
    plain = cut(parent, config, context("b"))
    assert repaired.config.shapes == plain.config.shapes != {}
    pictures = repair.pictures(preprocessor("resnet-small", 80), 17, here)
    with torch.no_grad():
        wanted = model.eval().encode(pictures)
        errors = [float(F.mse_loss(pruned.encode(pictures), wanted)) for pruned in (repaired, plain)]
    assert errors[0] < 0.9 * errors[1], errors


def test_the_concept_extractor_without_what_it_says_twice_says_the_same():
    """Its second layer takes over what the twins gave; without the refit it would not, and the refit equals numpy's least squares."""
    model = with_concepts(build())
    [unit] = channels.units(model, ("concepts",))
    assert (unit.kind, unit.width, unit.readers) == ("concept", 16, ("alignment.second",))
    grids = torch.randn(2, 6, model.config.grid**2, model.config.channels, generator=torch.Generator().manual_seed(3))
    gone = [channels.Block(unit, tuple(range(8, 16)), 0.0)]
    plain = channels.remove(model, gone)
    refit = repair.Repair(None, tuple(grids)).without(model, gone, None)
    assert refit.alignment.first.out_features == refit.alignment.second.in_features == 8 and model.alignment.first.out_features == 16
    with torch.no_grad():
        wanted, mine, without = (some.alignment(grids[0], model.windows) for some in (model, refit, plain))
    assert (mine - wanted).square().mean() < 1e-4 * wanted.var() < (without - wanted).square().mean()
    assert torch.equal(refit.find_concepts(grids[0]), model.find_concepts(grids[0]))

    four = [channels.Block(unit, (*range(4, 8), *range(12, 16)), 0.0)]
    fewer = repair.Repair(None, tuple(grids)).without(model, four, None).alignment
    with torch.no_grad():
        read = fewer.act(model.windows @ fewer.first(grids.flatten(0, 1))).flatten(0, 1)
        goal = model.alignment(grids.flatten(0, 1), model.windows).flatten(0, 1).double()
        read = torch.cat([read, torch.ones(len(read), 1)], 1).double()
        given = torch.cat([fewer.second.weight.T, fewer.second.bias[None]]).double()
    solved = torch.linalg.lstsq(read, goal, driver="gelsd").solution
    mine, best = ((read @ weights - goal).square().mean() for weights in (given, solved))
    assert best <= mine < 1.01 * best


# ---- recovery


@pytest.mark.parametrize("disturbed", [{}, {"flip": True, "crop": 0.3}])
def test_an_unpruned_encoder_has_nothing_to_recover(pruning, disturbed, monkeypatch):
    """Its norms keep their statistics: it stays where it was, though its batches are small; its parent sees the same pictures."""
    model, _, preprocessing, parent, context = pruning
    here = context("a")
    recovered, before = LightCap.from_pretrained(parent.path), dict(model.encoder.named_buffers())
    config = Prune(macs=0.7, batch_images=4, encoder_learning_rate=1e-4, precision="fp32", **disturbed)
    seen, real = [], LightCap.encode
    monkeypatch.setattr(LightCap, "encode", lambda self, batch: seen.append(batch.detach().clone()) or real(self, batch))
    importlib.import_module("compress.stages.prune.recover").recover_encoder(recovered, parent, preprocessing, config, 17, "encoder", here)
    steps = [batch for batch in seen if len(batch) == config.batch_images]
    if disturbed:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(steps[::2], steps[1::2], strict=True))
    whole = normalised(pixels(here.data.split("train"), preprocessing, here.cache, here.progress), preprocessing, device())
    known = [any(torch.allclose(picture, other, atol=1e-5) for other in whole) for picture in steps[0]]
    assert not all(known) if disturbed else all(known)
    assert all(torch.equal(buffer, before[name]) for name, buffer in recovered.encoder.named_buffers())
    pictures = torch.randn(8, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        goal, grid = model.eval().encode(pictures), recovered.encode(pictures)
    assert (grid - goal).square().mean() < 0.02 * goal.var()


def test_recovery_brings_the_grid_nearer(pruning, monkeypatch):
    model, _, preprocessing, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    given = {"macs": 0.5, "parts": ("encoder",), "batch_images": 8, "recover_epochs": 0.0, "encoder_learning_rate": 3e-4}
    here = context("plain")
    plain = cut(parent, Prune(**given, recover_encoder_epochs=0.0), here)
    recovered = cut(parent, Prune(**given, recover_encoder_epochs=6.0), context("recovered"))
    seen = repair.pictures(preprocessing, 17, here)
    with torch.no_grad():
        goal = model.eval().encode(seen)
        errors = [float((one.encode(seen) - goal).square().mean() / goal.var()) for one in (recovered, plain)]
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize("parts", [("concepts",), ("encoder",)])
def test_recovery_finds_more_of_what_the_parent_found(pruning, tmp_path, monkeypatch, parts):
    """Where its own channels left, and where it looks at the grid of a pruned encoder."""
    model, tokenizer, preprocessing, _, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    model, here = with_concepts(model, inner=64), context("plain")
    seen = repair.pictures(preprocessing, 17, here)
    with torch.no_grad():  # so that pictures differ in their odds, and no two inner channels say the same
        first = model.alignment.first
        first.weight.normal_(generator=torch.Generator().manual_seed(5))
        deviation, mean = torch.std_mean(first(model.encode(seen)), (0, 1))
        first.weight.div_(deviation[:, None])
        first.bias.copy_((first.bias - mean) / deviation)
    (tmp_path / "finder").mkdir()
    write_captioner(tmp_path / "finder", model, tokenizer, preprocessing)
    gone = 48 * prices.savings(model, prices.PRICES["macs"])["concept", "alignment"]
    share = {"concepts": 1 - gone / prices.macs(model), "encoder": 0.6}[parts[0]]
    given = {"macs": share, "parts": parts, "batch_images": 8, "recover_epochs": 0.0, "recover_encoder_epochs": 0.0}
    parent = Artifact(tmp_path / "finder")
    both = [cut(parent, Prune(**given, recover_concepts_epochs=0.0), here)]
    both.append(cut(parent, Prune(**given, recover_concepts_epochs=60.0), context("recovered")))
    assert both[0].config.shapes == both[1].config.shapes != {}
    with torch.no_grad():
        goal = model.eval().concept_scores(model.encode(seen)).sigmoid()
        plain, recovered = (float(concept_loss(one.concept_scores(one.encode(seen)), goal)) for one in both)
        least = float(concept_loss(goal.logit(), goal))
    assert recovered - least < 0.5 * (plain - least), (recovered, plain, least)


def test_recovery_brings_captions_nearer(pruning, monkeypatch):
    model, tokenizer, preprocessing, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    # The parent is not trained, so its best 16 pieces are few of what it says.
    given = {"params": 0.99, "parts": ("fusion",), "batch_images": 8, "learning_rate": 1e-3, "token_weight": 1.0, "dropout": 0.0}
    given["top_k"] = 400
    here = context("plain")
    both = [cut(parent, Prune(**given, recover_epochs=0.0), here), cut(parent, Prune(**given, recover_epochs=6.0), context("recovered"))]
    _, moved = sensitivity.measured(model, tokenizer, preprocessing, 17, here)
    for one in both:
        one.narrow(importance.corpus(one, tokenizer, preprocessing, here).keep)
    plain, recovered = map(moved, both)
    assert recovered < 0.8 * plain, (recovered, plain)
