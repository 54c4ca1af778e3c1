"""Pruning: what is removed equals what is silenced, the target is met and not overshot, importance is a gate's derivative."""

import copy
import dataclasses
import importlib
import json
import re

import pytest
import stage_context
import torch
import torch.nn.functional as F
from torch import nn

from compress import cost, data
from compress.artifact import Artifact
from compress.config import Data, Prune, Student
from compress.context import Context
from compress.errors import StageError, TargetError
from compress.stages import prune
from compress.stages.prune import channels, sensitivity, target
from compress.training.batches import IGNORED, Captions, pack
from compress.training.features import device, normalised, pixels
from compress.training.start import new_captioner, write_captioner
from students.lightcap import LightCap, preset
from students.lightcap.encoder import CLIP_MEAN, CLIP_STD, ENCODERS, EncoderSpec, preprocessor
from students.lightcap.tokenizer import load_tokenizer

# The package names its functions alike.
importance, repair = (importlib.import_module(f"compress.stages.prune.{name}") for name in ("importance", "repair"))

ENCODER_UNITS = {  # by hand: within blocks, and (how many convolutions write each) between them; the grid's own are none
    "resnet-small": (5, [2, 2]),  # both of the stem, the first of each block; a block's output is its second's and its shortcut's
    "clip-small": (3 + 2 * 4, [2, 2, 2]),  # the stem, the first two of each bottleneck; three stages, and the grid
    "efficientnet-lite0": (1 + 1 + 15 + 1, [2, 2, 3, 3, 4]),  # stem, first block's output, each expansion, last block's output; five stages
}


def small_clip(size: int) -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    trunk = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=32, heads=4, image_size=size, width=16)
    trunk.attnpool = nn.Identity()
    return trunk


@pytest.fixture(autouse=True)
def clip_small(monkeypatch):
    monkeypatch.setitem(ENCODERS, "clip-small", EncoderSpec(64, 32, 512, CLIP_MEAN, CLIP_STD, small_clip))


def build(encoder: str = "resnet-small", vocabulary: int = 40, **sizes) -> LightCap:
    """Random weights, and batch norms that do something."""
    torch.manual_seed(1)
    model = LightCap(preset("tiny", encoder=encoder, vocabulary=vocabulary, dropout=0.0, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.startswith("fusion.layers") and name.endswith("bias"):
                weight.normal_(0, 0.3)
        for module in model.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.6, 1.4)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def outputs(model: LightCap) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of two pictures, and the logits of their captions."""
    size = model.config.image_size
    batch = pack(Captions.of([[[2, 7, 9, 3], [2, 30, 3]], [[2, 5, 6, 3]]]), [0, 1])
    with torch.no_grad():
        grid = model.encode(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))
        states = model.states(grid / grid.std(), batch.tokens, batch.positions, batch.mask(grid.shape[1]))
        return grid / grid.std(), model.heads(states[batch.segments > 0], model.word)


def norms_of(encoder: str, name: str) -> list[str]:
    """The batch norms behind a convolution's channels, its depthwise reader's too, as the architecture's paper draws it."""
    name = name.removeprefix("encoder.")
    if encoder == "resnet-small":
        return [{"stem.0": "stem.1", "stem.3": "stem.4"}.get(name, name.replace("conv", "bn").replace("shortcut.0", "shortcut.1"))]
    if encoder == "clip-small":
        return [name.replace("conv", "bn").replace("downsample.0", "downsample.1")]
    if name == "net.conv_stem":
        return ["net.bn1", "net.blocks.0.0.bn1"]
    if name == "net.blocks.0.0.conv_pw":
        return ["net.blocks.0.0.bn2"]
    block, kind = re.fullmatch(r"(net\.blocks\.\d\.\d)\.conv_(pw|pwl)", name).groups()
    return [f"{block}.bn1", f"{block}.bn2"] if kind == "pw" else [f"{block}.bn3"]


def norms_behind(model: LightCap, unit: channels.Unit) -> list[nn.Module]:
    names = [name for writer in unit.writers for name in norms_of(model.config.encoder, writer)]
    return [model.encoder.get_submodule(name) for name in names]


def silence(model: LightCap, chosen: list[channels.Block]) -> None:
    """Sets what the removed channels give to zero, at full width."""
    with torch.no_grad():
        for block in chosen:
            gone = list(block.channels)
            if block.unit.kind == "conv":
                for norm in norms_behind(model, block.unit):
                    norm = norm[0] if isinstance(norm, torch.nn.Sequential) else norm
                    norm.weight[gone], norm.bias[gone] = 0.0, 0.0
                continue
            layer = model.get_submodule(block.unit.name)
            if block.unit.kind == "ffn":
                layer.down.weight[:, gone] = 0.0
            else:
                for head in gone:
                    layer.output.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0.0


def ranked(model: LightCap, round_to: int = 8, parts=("encoder", "fusion"), seed: int = 5) -> list[channels.Block]:
    source = torch.Generator().manual_seed(seed)
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, parts)}
    return channels.blocks(scores, round_to, target.savings(model, target.PRICES["macs"]))


@pytest.mark.parametrize("encoder", ENCODER_UNITS)
def test_removing_is_silencing(encoder, tmp_path):
    model = build(encoder)
    units = channels.units(model, ("encoder", "fusion"))
    inside, between = ENCODER_UNITS[encoder]
    writers = sorted(len(unit.writers) for unit in units if unit.kind == "conv")
    assert writers == [1] * inside + between and len(units) == len(set(units)) == len(writers) + 2 * 2
    order = ranked(model)
    last = {block.unit: block for block in order}
    chosen = [block for block in order if block is not last[block.unit] or block.unit.kind != "conv"]
    assert {block.unit.kind for block in chosen} == {"conv", "ffn", "head"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = channels.remove(model, chosen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # a copy was cut
    untouched = outputs(model)
    silence(model, chosen)
    for mine, wanted, plain in zip(outputs(smaller), outputs(model), untouched, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - plain).abs().max() > 1e-2
    assert target.parameters(smaller) < 0.9 * target.parameters(model)
    smaller.save_pretrained(tmp_path)
    loaded = LightCap.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), smaller.state_dict().values(), strict=True))
    for mine, again in zip(outputs(smaller), outputs(loaded), strict=True):
        torch.testing.assert_close(again, mine, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoder", ENCODER_UNITS)
@pytest.mark.parametrize("round_to", [8, 4])
def test_what_stays(encoder, round_to):
    """All blocks gone: widths are multiples, at least a quarter; vocabulary, hidden size, grid and head width are as they were."""
    model = build(encoder)
    order = ranked(model, round_to)
    smaller = channels.remove(model, order)
    left = {(unit.kind, unit.name): unit.width for unit in channels.units(smaller, ("encoder", "fusion"))}
    for unit in channels.units(model, ("encoder", "fusion")):
        width = left[unit.kind, unit.name]
        gone = [channel for block in order if block.unit == unit for channel in block.channels]
        assert len(gone) == len(set(gone)) == unit.width - width
        if unit.kind == "head":
            assert width == 1
        elif width < unit.width:
            assert width % round_to == 0 and width >= 0.25 * unit.width - round_to / 2
    assert smaller.word.shape == model.word.shape and smaller.fusion.grid.weight.shape == model.fusion.grid.weight.shape
    assert [layer.head_dim for layer in smaller.fusion.layers] == [16, 16]
    size = model.config.image_size
    with torch.no_grad():
        grid = smaller.encode(torch.zeros(1, 3, size, size))
    assert grid.shape == (1, model.config.grid**2, model.config.channels)
    for layer in smaller.fusion.layers:
        assert layer.output.out_features == layer.down.out_features == 32


def test_a_quarter_of_the_whole_width_stays_after_any_number_of_steps():
    model = build()
    whole = channels.units(model, ("encoder", "fusion"))
    smaller = channels.remove(model, ranked(model))
    savings = target.savings(smaller, target.PRICES["macs"])
    for before, more in ((whole, False), ((), True)):
        scores = {unit: torch.rand(unit.width) for unit in channels.units(smaller, ("encoder", "fusion"), before)}
        assert bool(channels.blocks(scores, 8, savings)) == more


def test_a_target_out_of_reach_is_said_before_the_first_step(tmp_path):
    model = build()
    scores = {unit: torch.rand(unit.width) for unit in channels.units(model, ("fusion",))}
    with pytest.raises(TargetError, match="prune: macs .* cannot be reached; with every removable block gone it is"):
        prune.leaving(model, scores, 8, target.Target.of(settings(macs=0.05), model), 0.01, tmp_path / "leaving-1.json")


def test_a_new_captioner_takes_a_pruned_encoder(tmp_path):
    model = build()
    channels.remove(model, [block for block in ranked(model) if block.unit.kind == "conv"][:4]).save_pretrained(tmp_path)
    pruned = LightCap.from_pretrained(tmp_path)
    made, *_ = new_captioner(Student(preset="tiny", encoder="resnet-small"), "tiny", None, 80, 0.0, 5, pruned)
    assert made.config.shapes == pruned.config.shapes and made.config.shapes
    picture = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(made.eval().encode(picture), pruned.encode(picture))


HIDDEN = {  # by hand: the axes of each weight, without its layer's or head's number, that hidden channels lie along
    "fusion.word.weight": [1], "fusion.position.weight": [1], "fusion.segment.weight": [1], "fusion.norm.weight": [0],
    "fusion.norm.bias": [0], "fusion.grid.weight": [0], "fusion.grid.bias": [0], "fusion.layers.norm1.weight": [0],
    "fusion.layers.norm1.bias": [0], "fusion.layers.norm2.weight": [0], "fusion.layers.norm2.bias": [0], "fusion.layers.query.weight": [1],
    "fusion.layers.key.weight": [1], "fusion.layers.value.weight": [1], "fusion.layers.up.weight": [1], "fusion.layers.output.weight": [0],
    "fusion.layers.output.bias": [0], "fusion.layers.down.weight": [0], "fusion.layers.down.bias": [0],
    "heads.branches.transform.weight": [0, 1], "heads.branches.transform.bias": [0], "heads.branches.norm.weight": [0],
    "heads.branches.norm.bias": [0], "modulator.down.weight": [1],
}  # fmt: skip


def test_hidden_channels_leave_all_that_reads_or_writes_them(tmp_path):
    """The weights of what stays, and no others, at any width of heads and feed-forward layers; it captions, narrows and is read again."""
    model = build(concepts=3, alignment=(8, 8), modulator=4)
    model.start_concepts(torch.randn(5, 8), torch.arange(10, 15).unsqueeze(1), torch.zeros(5), 8, 3)
    unit = channels.units(model, ("hidden",))[0]
    assert (unit.kind, unit.width) == ("hidden", 32)
    stay = [index for index in range(32) if index % 4]
    smaller = channels.remove(model, [channels.Block(unit, tuple(range(0, 32, 4)), 0.0)])
    for name, tensor in model.state_dict().items():
        for axis in HIDDEN.get(re.sub(r"\.\d+", "", name) if not name.startswith("encoder") else name, []):
            tensor = tensor.index_select(axis, torch.tensor(stay))
        assert torch.equal(smaller.state_dict()[name], tensor), name
    assert smaller.word.shape[1] == 24 and model.word.shape[1] == 32
    smaller.narrow(torch.arange(30))
    smaller.save_pretrained(tmp_path)
    again = LightCap.from_pretrained(tmp_path)
    with torch.no_grad():
        grid = torch.randn(1, model.config.grid**2, model.config.channels)
        logits, past = again.step(torch.tensor([[2]]), 0, again.prefill(grid))
        assert logits.shape == (1, 30) and torch.equal(logits, smaller.eval().step(torch.tensor([[2]]), 0, smaller.prefill(grid))[0])


def test_the_least_important_leave_first():
    unit = channels.Unit("ffn", "fusion.layers.0", 20)
    other = channels.Unit("ffn", "fusion.layers.1", 16)
    score = torch.arange(20.0).flip(0)
    found = channels.blocks({unit: score, other: torch.full((16,), 100.0)}, 8, {("ffn", unit.name): 2.0, ("ffn", other.name): 2.0})
    assert [block.unit.name[-1] for block in found] == ["0", "0", "1"]
    assert found[0].channels == (19, 18, 17, 16)  # 20 is no multiple of 8: the first block leaves 16
    assert found[1].channels == tuple(range(15, 7, -1))
    assert found[0].cost == pytest.approx((0 + 1 + 2 + 3) / 4 / 2) and found[2].cost == 50.0
    cheap = channels.blocks({unit: score, other: score[:16]}, 8, {("ffn", unit.name): 1.0, ("ffn", other.name): 1000.0})
    assert cheap[0].unit == other  # what saves more goes first


# ---- targets


def settings(**changes) -> Prune:
    return Prune(**changes)


@pytest.mark.parametrize("wanted", [{"macs": 0.7}, {"params": 0.8}, {"mb": 1.6}, {"macs": 0.8, "mb": 1.4}])
def test_the_target_is_reached_and_not_overshot(wanted):
    model = build()
    goal = target.Target.of(settings(**wanted), model)
    order = ranked(model)
    count = target.choose(model, order, goal)
    enough, fewer = (channels.remove(model, order[:blocks]) for blocks in (count, count - 1))
    assert [aim.name for aim in goal.aims] == list(wanted)
    assert all(aim.measure(enough) <= aim.wanted for aim in goal.aims) and any(aim.measure(fewer) > aim.wanted for aim in goal.aims)
    for aim in goal.aims:
        assert aim.wanted == pytest.approx(wanted[aim.name] if aim.name == "mb" else wanted[aim.name] * aim.before)
        assert aim.at(0.5) == pytest.approx((aim.before + aim.wanted) / 2) and aim.at(1.0) == pytest.approx(aim.wanted)


def test_megabytes_are_of_the_whole_artifact():
    """What is beside the weights stays, so more of them must leave."""
    model = build()
    alone, beside = (target.Target.of(settings(mb=1.6), model, beside=extra) for extra in (0.0, 0.1))
    [aim] = beside.aims
    assert aim.before == pytest.approx(target.megabytes(model) + 0.1)
    smaller = channels.remove(model, ranked(model)[: target.choose(model, ranked(model), beside)])
    assert target.megabytes(smaller) <= 1.5 and not alone.missed(smaller, 1.0)


def test_of_two_aims_each_counts_by_its_share_of_the_way_until_it_is_met():
    """A channel's saving in MACs over those that shall go, and in parameters over those; what is met already, or here by layers, is left
    out, and what is met on the way ranks no block behind it."""
    model = build()
    wanted = {"macs": 0.7, "params": 0.5}, {"macs": 0.7}, {"params": 0.5}
    both, one, other = (target.Target.of(settings(**aims), model) for aims in wanted)
    key = "conv", channels.units(model, ("encoder",))[2].name
    assert one.savings(model)[key] == pytest.approx(target.savings(model, target.PRICES["macs"])[key] / (0.3 * target.macs(model)))
    assert both.savings(model)[key] == pytest.approx(one.savings(model)[key] + other.savings(model)[key])
    assert target.Target.of(settings(macs=0.7, mb=99.0), model).savings(model) == one.savings(model)

    source = torch.Generator().manual_seed(5)
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, ("encoder", "fusion"))}

    def by(aims: target.Target) -> list[tuple]:
        return [(block.unit, block.channels) for block in channels.blocks(scores, 8, aims.savings(model))]

    order = target.ranked(model, scores, 8, both)
    named = [(block.unit, block.channels) for block in order]
    first = next(count for count in range(len(order)) if len(both.missed(channels.remove(model, order[:count]), 1.0)) < 2)
    [open_aim] = both.missed(channels.remove(model, order[:first]), 1.0)
    assert first > 0 and named[:first] == by(both)[:first] != by(both) and sorted(map(str, named)) == sorted(map(str, by(both)))
    assert named[first:] == [name for name in by(target.Target((open_aim,))) if name not in named[:first]] != by(both)[first:]
    assert target.ranked(model, scores, 8, one) == channels.blocks(scores, 8, one.savings(model))

    shorter = sensitivity.with_layers(model, [0])
    goal = target.Target.of(settings(macs=0.7, params=0.985), model)
    assert [aim.name for aim in goal.missed(shorter, 1.0)] == ["macs"]
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(shorter, ("encoder", "fusion"))}
    assert target.ranked(shorter, scores, 8, goal) == channels.blocks(scores, 8, one.savings(shorter))


def test_megabytes_are_those_on_disk(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert target.megabytes(model) == pytest.approx((tmp_path / "model.safetensors").stat().st_size / 1e6, rel=0.02)


def test_macs_of_a_model_are_those_of_its_config():
    model = build()
    smaller = channels.remove(model, ranked(model)[:9])
    assert target.macs(model) == cost.count_macs(model.config).caption > target.macs(smaller)


def test_savings_are_what_a_channel_costs():
    """One channel of each unit removed: the exact counts fall by what `savings` says."""
    model = with_concepts(build())

    for name, measure in target.COUNTS.items():
        said, whole = target.savings(model, target.PRICES[name]), measure(model)
        units = channels.units(model, ("encoder", "fusion", "concepts", "hidden"))
        for unit in units if name != "macs" else [units[1], units[3], units[5], units[6], *units[-3:]]:
            fell = whole - measure(channels.remove(model, [channels.Block(unit, (0,), 0.0)]))
            assert fell == pytest.approx(said[unit.kind, unit.name], rel=0.05), (name, unit)


def test_impossible_targets_are_one_line(monkeypatch):
    model = build()
    goal = target.Target.of(settings(params=0.9, macs=0.01), model)
    with pytest.raises(StageError, match="prune: macs .* cannot be reached; with every removable block gone it is") as raised:
        target.choose(model, ranked(model), goal)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1
    with pytest.raises(StageError, match="prune to mb: 99 is not below the parent's"):
        target.Target.of(settings(mb=99.0), model)
    with pytest.raises(StageError, match="prune to mb: 99 is not below the parent's .* and ms: 9000 is not below"):
        monkeypatch.setattr(target, "times_by_part", lambda model: (5.0, 2.0, 10.0))
        target.Target.of(settings(mb=99.0, ms=9000.0), model)


# ---- importance and the whole stage


@pytest.mark.parametrize("encoder", ["resnet-small", "clip-small", "efficientnet-lite0"])
def test_norms_give_each_channel_that_stays_the_mean_and_spread_of_before(encoder):
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


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=40, val_images=4))


@pytest.fixture
def world(scenes, tmp_path):
    """A captioner on scenes, and the context in which a stage is called."""
    tokenizer = load_tokenizer("english")
    model = build(vocabulary=tokenizer.get_vocab_size())
    preprocessing = preprocessor("resnet-small", 80)
    (tmp_path / "parent").mkdir()
    write_captioner(tmp_path / "parent", model, tokenizer, preprocessing)

    def context(name: str) -> Context:
        return stage_context.context(tmp_path / name, scenes, "prune", Prune(macs=0.7), cache=tmp_path / "cache")

    return model, tokenizer, preprocessing, Artifact(tmp_path / "parent"), context


def cut(parent: Artifact, config: Prune, here: Context) -> LightCap:
    prune.run(parent, config, here)
    return LightCap.from_pretrained(here.output)


def test_importance_is_the_derivative_at_a_gate(world, monkeypatch):
    """By finite differences of each picture's loss, with gates on all that reads a channel."""
    model, tokenizer, preprocessing, _, context = world
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


def test_gates_sit_behind_depthwise_convolutions():
    """What an expansion gives is read by the projection behind its depthwise convolution, and by nothing else."""
    units = {unit.name: unit for unit in channels.units(build("efficientnet-lite0"), ("encoder",))}
    expansion = units["encoder.net.blocks.2.1.conv_pw"]
    assert (expansion.writers, expansion.readers) == ((expansion.name,), ("encoder.net.blocks.2.1.conv_pwl",))
    assert units["encoder.net.conv_stem"].readers == ("encoder.net.blocks.0.0.conv_pw",)
    stage = next(unit for unit in units.values() if unit.writers == ("encoder.net.blocks.2.0.conv_pwl", "encoder.net.blocks.2.1.conv_pwl"))
    assert stage.readers == ("encoder.net.blocks.2.1.conv_pw", "encoder.net.blocks.3.0.conv_pw")


def test_importance_by_distillation_is_the_curvature_of_the_kl(world, monkeypatch):
    """The KL divergence from the model to itself with one gate moved by eps, over eps squared; means over many draws."""
    model, tokenizer, preprocessing, _, context = world
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


def test_magnitude_is_of_folded_weights(world):
    model, tokenizer, preprocessing, _, context = world
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


def test_the_stage_meets_its_target_and_is_the_same_twice(world, monkeypatch):
    model, tokenizer, _, parent, context = world
    monkeypatch.setattr(importance, "BATCHES", 1)
    config = Prune(params=0.7, steps=2, round_to=4, recover_epochs=1, recover_encoder_epochs=1, batch_images=20, learning_rate=1e-3)
    made = []
    for name in ("a", "b"):
        here = context(name)
        prune.run(parent, config, here)
        made.append(Artifact(here.output))
    assert made[0].digest() == made[1].digest() != parent.digest()
    pruned = LightCap.from_pretrained(made[0].path)
    assert 0.6 < target.parameters(pruned) / target.parameters(model) <= 0.7
    assert pruned.config.vocabulary == model.config.vocabulary
    assert dataclasses.replace(pruned.config, shapes={}) == model.config
    assert (made[0].path / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()


def test_hidden_channels_leave_by_the_stage_and_the_export_says_the_same(world, monkeypatch):
    from compress import runtime
    from compress.stages.export import export

    model, tokenizer, _, parent, context = world
    monkeypatch.setattr(importance, "BATCHES", 1)
    here = context("a")
    pruned = cut(parent, Prune(params=0.85, parts=("hidden",), recover_encoder_epochs=0.0, batch_images=20), here)
    assert pruned.word.shape[1] < model.word.shape[1] and pruned.config.hidden == model.config.hidden
    assert target.parameters(pruned) <= 0.85 * target.parameters(model)
    export(Artifact(here.output), here.output.parent / "export")
    captioner = runtime.Captioner(here.output.parent / "export", threads=1)
    grid = torch.randn(1, model.config.grid**2, model.config.channels)
    with torch.no_grad():
        logits, _ = pruned.step(torch.tensor([[tokenizer.token_to_id("[CLS]")]]), 0, pruned.prefill(grid))
    mine, _ = captioner.step([captioner.start], 0, captioner.prefill(grid.numpy()))
    torch.testing.assert_close(torch.from_numpy(mine), logits, atol=1e-4, rtol=1e-4)


def test_parts_are_left_alone(world, monkeypatch):
    model, _, _, parent, context = world
    monkeypatch.setattr(importance, "BATCHES", 1)
    here = context("a")
    pruned = cut(parent, Prune(params=0.99, parts=("fusion",), round_to=8, batch_images=40), here)
    assert all(torch.equal(a, b) for a, b in zip(pruned.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True))
    assert {name.split(".")[0] for name in pruned.config.shapes} == {"fusion"}


def test_the_stage_repairs_what_it_cuts(world, monkeypatch):
    """Without recovery, the grid of the same cut is nearer to the parent's with repaired norms than with those that it had."""
    model, _, _, parent, context = world
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


# ---- the concept extractor


def with_concepts(model: LightCap, inner: int = 16) -> LightCap:
    """An extractor of random weights, but that the inner channels 8.. repeat the first ones: half of them say nothing new."""
    source = torch.Generator().manual_seed(4)
    matrix = F.normalize(torch.randn(12, 8, generator=source), dim=1)
    model.start_concepts(matrix, torch.arange(10, 22).unsqueeze(1), torch.zeros(12), inner, 3)
    with torch.no_grad():
        model.alignment.first.weight[inner // 2 :] = model.alignment.first.weight[: inner // 2]
        model.alignment.first.bias[inner // 2 :] = model.alignment.first.bias[: inner // 2]
        model.alignment.second.weight.mul_(torch.linspace(3.0, 1.0, inner))
    return model.eval()


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


def test_a_channel_of_the_concept_extractor_matters_by_the_variance_it_gives(world, monkeypatch):
    model, tokenizer, preprocessing, _, context = world
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


@pytest.mark.parametrize("importance_of", ["caption", "magnitude"])
def test_the_stage_narrows_the_concept_extractor(world, tmp_path, monkeypatch, importance_of):
    """Exactly as much as counted, and what stays says of training pictures what the whole said; the export finds the same concepts."""
    from compress import runtime
    from compress.stages.export import export

    model, tokenizer, preprocessing, _, context = world
    model = with_concepts(model, inner=64)
    monkeypatch.setattr(importance, "BATCHES", 1)
    (tmp_path / "finder").mkdir()
    write_captioner(tmp_path / "finder", model, tokenizer, preprocessing)
    parent, here = Artifact(tmp_path / "finder"), context("a")
    saved = target.savings(model, target.PRICES["macs"])["concept", "alignment"] * 16
    config = Prune(
        macs=1 - saved / target.macs(model), parts=("concepts",), importance=importance_of, recover_epochs=0.0, recover_encoder_epochs=0.0
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


def test_what_the_target_did_not_need_comes_back():
    """A last block that saves far more than what was missing lets earlier ones return, and the target still holds."""
    model = build()
    order = ranked(model)
    goal = target.Target.of(settings(macs=0.7), model)
    chosen = order[: target.choose(model, order, goal)]
    kept = target.give_back(model, chosen, goal)
    assert set(kept) <= set(chosen) and not goal.missed(channels.remove(model, kept), 1.0)
    for block in kept:
        last_of_unit = [other for other in kept if other.unit == block.unit][-1] == block
        if last_of_unit and len(kept) <= target.RETURNS:
            rest = [other for other in kept if other != block]
            assert goal.missed(channels.remove(model, rest), 1.0)


# ---- what is measured in the loss itself


@pytest.mark.parametrize("wanted", [{"macs": 0.7}, {"params": 0.7}])
def test_what_leaves_is_decided_once(tmp_path, wanted):
    """After a stop the same blocks leave, though a GPU's sums may rank others first then."""
    model, found = build(), []
    goal = target.Target.of(settings(**wanted), model)
    for seed, note in ((5, "leaving"), (6, "leaving"), (6, "other")):
        source = torch.Generator().manual_seed(seed)
        scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, ("encoder", "fusion"))}
        blocks = prune.leaving(model, scores, 8, goal, 1.0, tmp_path / "work" / f"{note}-1.json")
        found.append([(block.unit, tuple(block.channels)) for block in blocks])
    assert found[0] == found[1] != found[2] and found[0]


def idle(model: LightCap, index: int) -> None:
    """Makes a layer of the fusion pass on what it reads: what it adds is nothing, and what is normalised already stays the same."""
    with torch.no_grad():
        for linear in (model.fusion.layers[index].output, model.fusion.layers[index].down):
            linear.weight.zero_()
            linear.bias.zero_()
        for layer in model.fusion.layers:
            layer.norm1.bias.zero_()
            layer.norm2.bias.zero_()


def test_the_layer_that_does_nothing_leaves_first():
    model = build(layers=3)
    idle(model, 1)
    before = outputs(model)[1]
    assert sensitivity.least_layers(model, lambda cut: float((outputs(cut)[1] - before).square().mean()), 2) == [0, 2]
    without = sensitivity.with_layers(model, [0, 2])
    assert without.config.layers == 2 and len(model.fusion.layers) == 3
    for mine, theirs in zip(outputs(without), outputs(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_measured_is_how_far_captions_move(world):
    """By hand: the KL divergence over the same batches, with the half silenced; repaired where it is the encoder's. A unit that does
    nothing moves nothing, and has the least factor."""
    model, tokenizer, preprocessing, _, context = world
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
    savings = target.savings(model, target.PRICES["macs"])
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
    elsewhere = dataclasses.replace(here, data=dataclasses.replace(here.data, fingerprint="other pictures"))
    for key, ranking, where in ((("parent", 18), scores, here), (("parent", 17), reversed_, here), (("parent", 17), scores, elsewhere)):
        with pytest.raises(AssertionError, match="measured again"):
            sensitivity.sensitivities(narrow, never, ranking, 8, savings, mend, key, where)


def test_layers_and_ratios_of_the_stage(world, monkeypatch):
    model, tokenizer, _, parent, context = world
    monkeypatch.setattr(importance, "BATCHES", 1)
    config = Prune(macs=0.7, layers=1, ratios="sensitivity", steps=2, batch_images=40, recover_epochs=1, recover_encoder_epochs=0.1)
    here = context("a")
    pruned = cut(parent, config, here)
    assert pruned.config.layers == 1 and target.macs(pruned) / target.macs(model) <= 0.7
    rises = json.loads((here.output / "sensitivity.json").read_text())
    assert {"fusion.layers.0 ffn", "encoder.stem.0 conv"} <= set(rises)


def test_a_layer_can_be_all_that_leaves(world, monkeypatch):
    """An encoder that lost nothing has nothing to recover."""
    model, _, _, parent, context = world
    here = context("a")
    monkeypatch.setattr(prune, "recover_encoder", None)
    pruned = cut(parent, Prune(params=0.99, layers=1, recover_epochs=0, batch_images=40), here)
    assert pruned.config.layers == 1 and not pruned.config.shapes
    kept = pruned.fusion.layers[0].state_dict()
    assert any(all(torch.equal(kept[name], value) for name, value in layer.state_dict().items()) for layer in model.fusion.layers)


# ---- recovery


@pytest.mark.parametrize("disturbed", [{}, {"flip": True, "crop": 0.3}])
def test_an_unpruned_encoder_has_nothing_to_recover(world, disturbed, monkeypatch):
    """Its norms keep their statistics: it stays where it was, though its batches are small; its parent sees the same pictures."""
    model, _, preprocessing, parent, context = world
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


def test_recovery_brings_the_grid_nearer(world, monkeypatch):
    model, _, preprocessing, parent, context = world
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


def test_recovery_brings_captions_nearer(world, monkeypatch):
    model, tokenizer, preprocessing, parent, context = world
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


# ---- milliseconds, and steps that are taken back


def test_a_time_is_the_models_own_beside_its_parents(monkeypatch):
    """The parent is slowed down by half between two askings: a model of half its time is still at half of the first."""
    parent, small, speed = build(), build(), {"parent": 10.0, "small": 5.0}
    names = {}

    def interleaved(works, rounds):
        return [[speed[names[id(work.__defaults__[0])]]] * rounds for work in works]

    monkeypatch.setattr(cost, "interleaved", interleaved)
    monkeypatch.setattr(target.copy, "deepcopy", lambda model: model)
    monkeypatch.setattr(target, "times_by_part", lambda model: (5.0, 2.0, 10.0))
    names |= {id(parent): "parent", id(small): "small"}
    clock = target.Clock.beside(parent)
    counted = cost.count_macs(parent.config)
    spent = (clock.price.encoder * counted.encoder, clock.price.prefix * counted.prefix, clock.price.step * counted.steps)
    assert spent == pytest.approx((5.0, 2.0, 3.0)) and clock.price.weight == 0
    assert (clock(parent), clock(small)) == (10.0, 5.0)
    speed.update(parent=15.0, small=7.5)
    assert (clock(parent), clock(small)) == (10.0, 5.0)


def test_a_target_in_milliseconds_takes_blocks_until_the_clock_says_so(world, monkeypatch):
    """With a clock that counts MACs, the stage ends where the target in MACs does, in the order of its prices; after a stop the clock is
    not asked again, and other prices change nothing."""
    model, _, _, parent, context = world
    monkeypatch.setattr(importance, "BATCHES", 1)
    before = target.macs(model)
    price = target.Price(1e-9, 1e-9, 50e-9)
    monkeypatch.setattr(target.Clock, "beside", lambda parent: target.Clock(parent, 20.0, price))
    monkeypatch.setattr(target.Clock, "__call__", lambda self, timed: 20.0 * target.macs(timed) / before)
    given = {"round_to": 4, "recover_epochs": 0.0, "recover_encoder_epochs": 0.0}
    here = context("a")
    prune.run(parent, Prune(ms=20 * 0.9, **given), here)
    assert 0.85 < target.macs(LightCap.from_pretrained(here.output)) / before <= 0.9
    assert not target.Target.of(settings(ms=15.0), model).exact and target.Target.of(settings(macs=0.7), model).exact

    again = dataclasses.replace(here, output=here.output.parent / "again")
    monkeypatch.setattr(prune, "choose", None)
    monkeypatch.setattr(target.Clock, "beside", lambda parent: target.Clock(parent, 20.0, target.Price(50e-9, 1e-9, 1e-9)))
    prune.run(parent, Prune(ms=20 * 0.9, **given), again)
    assert Artifact(again.output).digest() == Artifact(here.output).digest()
    with pytest.raises(StageError, match="prune to ms: 30 is not below the parent's 20"):
        target.Target.of(settings(ms=30.0), model)


@pytest.mark.parametrize(("drops", "steps"), [((1.0, 2.5), 1), ((1.0, 1.5), 2), ((3.0,), 1)])
def test_a_step_that_loses_too_much_is_taken_back(world, monkeypatch, drops, steps):
    model, _, _, parent, context = world
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
    share = target.parameters(made) / target.parameters(model)
    assert share <= 0.8 if steps == 2 else 0.8 < share <= 0.9
    assert Artifact(here.output).digest() == Artifact(here.work / f"step-{steps}").digest()
