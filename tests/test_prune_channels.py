"""What can be removed: it equals what is silenced, and what must stay does."""

import re

import pytest
import torch
from prunable import build, outputs, ranked, silence

from compress.config import Student
from compress.stages.prune import channels, prices
from compress.training.start import new_captioner
from students.lightcap import LightCap

ENCODER_UNITS = {  # by hand: within blocks, and (how many convolutions write each) between them; the grid's own are none
    "resnet-small": (5, [2, 2]),  # both of the stem, the first of each block; a block's output is its second's and its shortcut's
    "clip-small": (3 + 2 * 4, [2, 2, 2]),  # the stem, the first two of each bottleneck; three stages, and the grid
    "efficientnet-lite0": (1 + 1 + 15 + 1, [2, 2, 3, 3, 4]),  # stem, first block's output, each expansion, last block's output; five stages
}


@pytest.mark.parametrize("encoder", ENCODER_UNITS)
def test_removing_is_silencing(clip_small, encoder, tmp_path):
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
    assert prices.parameters(smaller) < 0.9 * prices.parameters(model)
    smaller.save_pretrained(tmp_path)
    loaded = LightCap.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), smaller.state_dict().values(), strict=True))
    for mine, again in zip(outputs(smaller), outputs(loaded), strict=True):
        torch.testing.assert_close(again, mine, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoder", ENCODER_UNITS)
@pytest.mark.parametrize("round_to", [8, 4])
def test_what_stays(clip_small, encoder, round_to):
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
    savings = prices.savings(smaller, prices.PRICES["macs"])
    for before, more in ((whole, False), ((), True)):
        scores = {unit: torch.rand(unit.width) for unit in channels.units(smaller, ("encoder", "fusion"), before)}
        assert bool(channels.blocks(scores, 8, savings)) == more


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
}


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


def test_gates_sit_behind_depthwise_convolutions():
    """What an expansion gives is read by the projection behind its depthwise convolution, and by nothing else."""
    units = {unit.name: unit for unit in channels.units(build("efficientnet-lite0"), ("encoder",))}
    expansion = units["encoder.net.blocks.2.1.conv_pw"]
    assert (expansion.writers, expansion.readers) == ((expansion.name,), ("encoder.net.blocks.2.1.conv_pwl",))
    assert units["encoder.net.conv_stem"].readers == ("encoder.net.blocks.0.0.conv_pw",)
    stage = next(unit for unit in units.values() if unit.writers == ("encoder.net.blocks.2.0.conv_pwl", "encoder.net.blocks.2.1.conv_pwl"))
    assert stage.readers == ("encoder.net.blocks.2.1.conv_pw", "encoder.net.blocks.3.0.conv_pw")
