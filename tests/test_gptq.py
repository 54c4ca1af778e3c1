"""GPTQ and SmoothQuant: how weights are rounded, and how ranges move from what layers read into weights."""

import copy
import itertools
import math

import pytest
import tiny_captioner as tiny
import torch
import torch.nn.functional as F
from torchao_reference import converted

from compress.context import Progress
from compress.stages.quantize import decoder, encoder, observe, simulate
from compress.stages.quantize.gptq import gptq, gptq_rounded, read_by
from compress.stages.quantize.smoothquant import Smoothed, smoothed
from students.lightcap.tokenizer import encode_captions

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def nearest(weight, scale, least=-128, most=127):
    return (weight / scale[..., None]).round().clamp(least, most) * scale[..., None]


def error(weight, rounded, hessian):
    """(G, O): the mean squared error of each output, up to a factor."""
    difference = weight - rounded
    return torch.einsum("goi,gij,goj->go", difference, hessian, difference)


def correlated(groups, inputs, count=4000):
    """The Hessian of inputs that are mostly one and the same number."""
    shared, own = torch.randn(groups, 1, count, dtype=torch.float64), torch.randn(groups, inputs, count, dtype=torch.float64)
    read = shared + 0.1 * own
    return read @ read.transpose(1, 2)


def test_uncorrelated_inputs_round_to_nearest():
    weight, scale = torch.randn(3, 5, 300, dtype=torch.float64), torch.full((3, 5), 0.03, dtype=torch.float64)
    hessian = torch.diag_embed(torch.rand(3, 300, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(gptq_rounded(weight, hessian, scale, -128, 127), nearest(weight, scale))


def test_correlated_inputs_round_so_that_errors_cancel():
    """Beside the best of all choices between the two integers beside each weight, which small groups allow to try."""
    weight, scale, hessian = torch.randn(8, 4, 6).double(), torch.full((8, 4), 0.05, dtype=torch.float64), correlated(8, 6)
    found = error(weight, gptq_rounded(weight, hessian, scale, -128, 127), hessian)
    floor = (weight / scale[..., None]).floor()
    choices = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    best = torch.stack([error(weight, (floor + choice) * scale[..., None], hessian) for choice in choices]).amin(0)
    plain = error(weight, nearest(weight, scale), hessian)
    assert found.mean() < 0.4 * plain.mean() and found.mean() < 2.5 * best.mean()


@pytest.mark.parametrize("inputs", [9, 300])  # within one block of columns, and over several
def test_rounded_weights_are_integers_in_bounds(inputs):
    weight, scale = torch.randn(2, 7, inputs), torch.full((2, 7), 0.02)
    hessian = correlated(2, inputs)
    found = gptq_rounded(weight, hessian, scale, -64, 63) / scale[..., None].double()
    torch.testing.assert_close(found, found.round(), atol=1e-9, rtol=0)
    assert found.min() >= -64 and found.max() <= 63 and (found == 63).any()
    plain = nearest(weight, scale, -64, 63).double()
    assert error(weight.double(), found * 0.02, hessian).mean() < error(weight.double(), plain, hessian).mean()


def test_channels_that_are_always_zero_leave_the_others_alone(monkeypatch):
    hessian = correlated(1, 6)
    hessian[:, 2], hessian[:, :, 2] = 0, 0
    weight, scale, rest = torch.randn(1, 3, 6).double(), torch.full((1, 3), 0.05, dtype=torch.float64), [0, 1, 3, 4, 5]
    found = gptq_rounded(weight, hessian, scale, -128, 127)
    torch.testing.assert_close(found[:, :, 2], nearest(weight, scale)[:, :, 2])
    monkeypatch.setattr("compress.stages.quantize.gptq.DAMPING", 0.01 * 5 / 6)  # of a mean over six, one of them zero
    torch.testing.assert_close(found[:, :, rest], gptq_rounded(weight[:, :, rest], hessian[:, rest][:, :, rest], scale, -128, 127))


@pytest.mark.parametrize("count", [0, 1, 3])  # of inputs seen: nothing, and less than there are columns
def test_too_few_inputs_still_give_integers_near_the_weight(count):
    weight, scale, read = torch.randn(1, 3, 8).double(), torch.full((1, 3), 0.05, dtype=torch.float64), torch.randn(1, 8, count).double()
    found = gptq_rounded(weight, read @ read.transpose(1, 2), scale, -128, 127)
    assert found.isfinite().all() and (found - weight).abs().max() < 10 * 0.05


def convolution(groups, kernel, stride, padding, dilation):
    """A graph's node of a convolution of 8 channels into 16, and its weight."""
    weight = torch.randn(16, 8 // groups, kernel, kernel)
    settings = ([stride, stride], [padding, padding], [dilation, dilation], groups)
    graph = torch.fx.Graph()
    return graph.call_function(torch.ops.aten.conv2d.default, (graph.placeholder("x"), graph.placeholder("w"), None, *settings)), weight


@pytest.mark.parametrize("settings", [(1, 3, 2, 1, 1), (4, 3, 1, 1, 2), (8, 5, 2, 2, 1), (1, 1, 1, 0, 1)])
@pytest.mark.parametrize("images", [1, 3])
def test_what_a_convolution_reads_times_its_rows_is_what_it_gives(settings, images):
    node, weight = convolution(*settings)
    x, groups = torch.randn(images, 8, 11, 9), settings[0]
    expected = F.conv2d(x, weight, None, *node.args[3:])  # (N, O, H, W) -> (groups, O / groups, N H W)
    expected = expected.unflatten(1, (groups, -1)).flatten(3).movedim(0, 2).flatten(2)
    grouped = weight.reshape(groups, 16 // groups, -1)
    torch.testing.assert_close(grouped @ read_by(node, x, weight.shape, groups), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_what_a_linear_layer_reads_is_all_its_rows(shape):
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.linear.default, (graph.placeholder("x"), graph.placeholder("w")))
    x, weight = torch.randn(*shape, 8), torch.randn(4, 8)
    found = weight @ read_by(node, x, weight.shape, 1)[0]
    torch.testing.assert_close(found, F.linear(x, weight).reshape(math.prod(shape), 4).T)


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.PRUNED, steps=120)


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(tiny.pixels(tiny.pictures(16)))


@pytest.fixture(scope="module")
def forced(model, pixels):
    captions = [encode_captions(tiny.tokenizer(), [tiny.caption(i)], 20) for i in range(16)]
    with torch.no_grad():
        return [decoder.teacher_forced(model, *sample) for sample in zip(model.encode(pixels).split(1), captions, strict=True)]


@pytest.fixture(scope="module")
def calibrated(model, pixels, forced):
    return encoder.calibrated(model, [pixels.numpy()]), decoder.calibrated(model, forced)


@pytest.fixture
def encoding(calibrated):
    return copy.deepcopy(calibrated[0])


@pytest.fixture
def decoding(calibrated):
    return copy.deepcopy(calibrated[1])


def distance(graph, samples, expected, activations=False):
    rounded = simulate.simulated(graph)
    for module in rounded.modules():
        if isinstance(module, simulate.ActivationRounding):
            module.on = activations
    with torch.no_grad():
        return sum(float((rounded(*sample) - goal).square().sum()) for sample, goal in zip(samples, expected, strict=True))


def test_gptq_brings_both_graphs_nearer_to_float(model, pixels, forced, encoding, decoding):
    """On inputs that it did not see."""
    others = torch.from_numpy(tiny.pixels(tiny.pictures(16, seed=5)))
    with torch.no_grad():
        decode = observe.TeacherForced(model)
        for graph, samples, asked, expected in (
            (encoding, [(pixels,)], [(others,)], [model.encode(others)]),
            (decoding, forced[:10], forced[10:], [decode(*sample) for sample in forced[10:]]),
        ):
            before, weights = copy.deepcopy(graph), {name: value.clone() for name, value in graph.named_parameters()}
            gptq(graph, samples, QUIET)
            assert distance(graph, asked, expected) < 0.7 * distance(before, asked, expected)
            assert all(torch.equal(value, weights[name]) for name, value in graph.named_parameters())  # offsets stand beside them
            again = copy.deepcopy(before)
            gptq(again, samples, QUIET)
            assert all(torch.equal(value, dict(again.named_buffers())[name]) for name, value in graph.named_buffers())


def test_a_part_in_float_has_its_own_weights(pixels, encoding):
    gptq(encoding, [(pixels,)], QUIET)
    simulation = simulate.simulated(encoding)
    simulate.switch([simulation], [part for part in simulate.parts(encoding) if part != "encoder.blocks.2"])
    with torch.no_grad():
        folded = converted(encoding, ("encoder.blocks.2",))(pixels)
        torch.testing.assert_close(folded, simulation(pixels), atol=1e-5, rtol=0)


def test_the_integers_of_both_graphs_are_those_of_the_simulation(pixels, forced, encoding, decoding):
    gptq(encoding, [(pixels,)], QUIET)
    gptq(decoding, forced, QUIET)
    with torch.no_grad():
        folded = converted(encoding)(pixels)
        torch.testing.assert_close(folded, simulate.simulated(encoding)(pixels), atol=1e-5, rtol=0)
    simulation = simulate.simulated(decoding)
    moved = 0
    for node in simulation.graph.nodes:
        if node.op == "call_module" and isinstance(rounding := simulation.get_submodule(node.target), simulate.WeightRounding):
            name = str(node.args[0].target)
            weight, scales = decoding.get_parameter(name), observe.linear_scales(decoding)[name]
            torch.testing.assert_close(torch.from_numpy(scales.integers * scales.weight[:, None]).float(), rounding(weight).detach())
            plain = (weight / rounding.scale(weight)[:, None]).round().clamp(-128, 127)
            moved += int((torch.from_numpy(scales.integers) != plain).sum())
    assert moved > 100


def test_smoothing_changes_ranges_and_not_the_function(model, forced):
    skewed = copy.deepcopy(model)
    with torch.no_grad():  # one channel that is read thirty times larger
        skewed.fusion.layers[0].norm1.weight[5] *= 30
        skewed.fusion.layers[0].up.weight[:, 5] /= 30
    even = smoothed(skewed, forced, 0.75)
    assert [name for name, module in even.named_modules() if isinstance(module, Smoothed)] == [
        f"fusion.layers.{index}.{half}" for index in range(2) for half in ("up", "down")]
    assert not any(isinstance(module, Smoothed) for module in skewed.modules())
    plain, better = decoder.calibrated(skewed, forced), decoder.calibrated(even, forced)
    with torch.no_grad():
        expected = [observe.TeacherForced(skewed)(*sample) for sample in forced]
        for sample, goal in zip(forced, expected, strict=True):
            torch.testing.assert_close(observe.TeacherForced(even)(*sample), goal, atol=1e-4, rtol=1e-4)
    assert distance(better, forced, expected, activations=True) < 0.5 * distance(plain, forced, expected, activations=True)
