"""The stage that prunes: its target in steps, its parts, and what it decides once."""

import dataclasses
import importlib
import json

import pytest
import torch
from prunable import build, cut, with_concepts

from compress.artifact import MODEL_FILES, Artifact
from compress.config import Prune
from compress.stages import prune
from compress.stages.prune import channels, prices, target
from compress.training.start import write_captioner
from students.lightcap import LightCap

# The package names its functions alike.
importance, repair = (importlib.import_module(f"compress.stages.prune.{name}") for name in ("importance", "repair"))


def test_the_stage_meets_its_target_and_is_the_same_twice(pruning, monkeypatch):
    model, tokenizer, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    config = Prune(params=0.7, steps=2, round_to=4, recover_epochs=1, recover_encoder_epochs=1, batch_images=20, learning_rate=1e-3)
    made = []
    for name in ("a", "b"):
        here = context(name)
        prune.run(parent, config, here)
        made.append(Artifact(here.output))
    assert made[0].digest() == made[1].digest() != parent.digest()
    pruned = LightCap.from_pretrained(made[0].path)
    assert 0.6 < prices.parameters(pruned) / prices.parameters(model) <= 0.7
    assert pruned.config.vocabulary == model.config.vocabulary
    assert dataclasses.replace(pruned.config, shapes={}) == model.config
    assert (made[0].path / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()


def test_hidden_channels_leave_by_the_stage_and_the_export_says_the_same(pruning, monkeypatch):
    from compress import runtime
    from compress.stages.export import export

    model, tokenizer, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    here = context("a")
    pruned = cut(parent, Prune(params=0.85, parts=("hidden",), recover_encoder_epochs=0.0, batch_images=20), here)
    assert pruned.word.shape[1] < model.word.shape[1] and pruned.config.hidden == model.config.hidden
    assert prices.parameters(pruned) <= 0.85 * prices.parameters(model)
    export(Artifact(here.output), here.output.parent / "export")
    captioner = runtime.Captioner(here.output.parent / "export", threads=1)
    grid = torch.randn(1, model.config.grid**2, model.config.channels)
    with torch.no_grad():
        logits, _ = pruned.step(torch.tensor([[tokenizer.token_to_id("[CLS]")]]), 0, pruned.prefill(grid))
    mine, _ = captioner.step([captioner.start], 0, captioner.prefill(grid.numpy()))
    torch.testing.assert_close(torch.from_numpy(mine), logits, atol=1e-4, rtol=1e-4)


def test_parts_are_left_alone(pruning, monkeypatch):
    model, _, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    here = context("a")
    pruned = cut(parent, Prune(params=0.99, parts=("fusion",), round_to=8, batch_images=40), here)
    assert all(torch.equal(a, b) for a, b in zip(pruned.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True))
    assert {name.split(".")[0] for name in pruned.config.shapes} == {"fusion"}


def test_layers_can_be_all_that_leaves(pruning):
    """Nothing else is ranked or cut, and the fusion learns again from the whole captioner."""
    model, _, _, parent, context = pruning
    pruned = cut(parent, Prune(layers=1, ratios="sensitivity", batch_images=20), here := context("a"))
    assert (pruned.config.layers, pruned.config.shapes) == (1, {})
    assert all(torch.equal(a, b) for a, b in zip(pruned.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True))
    assert not any(torch.equal(pruned.fusion.layers[0].up.weight, layer.up.weight) for layer in model.fusion.layers)
    assert sorted(path.name for path in here.output.iterdir()) == sorted(MODEL_FILES)


@pytest.mark.parametrize("importance_of", ["caption", pytest.param("magnitude", marks=pytest.mark.slow)])
def test_the_stage_narrows_the_concept_extractor(pruning, tmp_path, monkeypatch, importance_of):
    """Exactly as much as counted, and what stays says of training pictures what the whole said; the export finds the same concepts."""
    from compress import runtime
    from compress.stages.export import export

    model, tokenizer, preprocessing, _, context = pruning
    model = with_concepts(model, inner=64)
    monkeypatch.setattr(importance, "BATCHES", 1)
    (tmp_path / "finder").mkdir()
    write_captioner(tmp_path / "finder", model, tokenizer, preprocessing)
    parent, here = Artifact(tmp_path / "finder"), context("a")
    saved = prices.savings(model, prices.PRICES["macs"])["concept", "alignment"] * 16
    config = Prune(
        macs=1 - saved / prices.macs(model), parts=("concepts",), importance=importance_of, recover_epochs=0.0,
        recover_encoder_epochs=0.0, recover_concepts_epochs=0.0
    )
    pruned = cut(parent, config, here)
    assert set(pruned.config.shapes) == {"alignment.first", "alignment.second"}
    assert pruned.config.shapes["alignment.first"] == (48, model.config.channels)
    assert not (here.output / "sensitivity.json").exists()
    pictures = repair.pictures(preprocessing, 17, here)
    with torch.no_grad():
        grid = model.encode(pictures)[:1]
        wanted, mine = (some.alignment(model.encode(pictures), model.windows) for some in (model, pruned))
        assert (mine - wanted).square().mean() < 0.05 * wanted.var((0, 1)).mean()
        logits, _ = pruned.step(torch.tensor([[tokenizer.token_to_id("[CLS]")]]), 0, pruned.prefill(grid))
    export(Artifact(here.output), here.output.parent / "export")
    captioner = runtime.Captioner(here.output.parent / "export", threads=1)
    mine, _ = captioner.step([captioner.start], 0, captioner.prefill(grid.numpy()))
    torch.testing.assert_close(torch.from_numpy(mine), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", [{"macs": 0.7}, {"params": 0.7}])
def test_what_leaves_is_decided_once(tmp_path, wanted):
    """After a stop the same blocks leave, though a GPU's sums may rank others first then."""
    model, found = build(), []
    goal = target.Target.of(Prune(**wanted), model)
    for seed, note in ((5, "leaving"), (6, "leaving"), (6, "other")):
        source = torch.Generator().manual_seed(seed)
        scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, ("encoder", "fusion"))}
        blocks = prune.leaving(model, scores, 8, goal, 1.0, tmp_path / "work" / f"{note}-1.json")
        found.append([(block.unit, tuple(block.channels)) for block in blocks])
    assert found[0] == found[1] != found[2] and found[0]


@pytest.mark.parametrize(("drops", "steps"), [((1.0, 2.5), 1), ((1.0, 1.5), 2), ((3.0,), 1)])
def test_a_step_that_loses_too_much_is_taken_back(pruning, monkeypatch, drops, steps):
    model, _, _, parent, context = pruning
    monkeypatch.setattr(importance, "BATCHES", 1)
    losses, asked = iter(drops), []

    def ciders(artifact):
        asked.append(artifact.path.name)
        return torch.tensor([50.0 if artifact.path.name == "parent" else 50.0 - next(losses)]).numpy()

    here = dataclasses.replace(context("a"), ciders=ciders)
    config = Prune(params=0.8, steps=2, round_to=4, recover_epochs=0.0, recover_encoder_epochs=0.0, max_drop_cider=2.0)
    prune.run(parent, config, here)
    assert asked == ["parent", *(f"step-{step}" for step in range(1, len(drops) + 1))]
    made = LightCap.from_pretrained(here.output)
    share = prices.parameters(made) / prices.parameters(model)
    assert share <= 0.8 if steps == 2 else 0.8 < share <= 0.9
    said, whole = json.loads((here.output / "target.json").read_text()), prices.parameters(model)
    assert said == {
        "target": "met" if steps == 2 else "not met", "steps": steps, "of": 2,
        "params": {"parent": whole, "wanted": pytest.approx(0.8 * whole), "reached": prices.parameters(made)},
    }
    assert Artifact(here.output).digest() == Artifact(here.work / f"step-{steps}").digest()
