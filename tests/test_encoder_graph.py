"""The encoder's ONNX graph, operator by operator: what PyTorch computes, or what is counted by hand."""

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn

from compress import graphs, runtime
from compress.errors import StageError
from compress.stages.export.encoder import encoder_graph
from compress.stages.quantize.encoder import quantized_encoder

aten = torch.ops.aten
GRID = [(aten.flatten.using_ints, 2), (aten.transpose.int, 1, 2)]


class Observer(nn.Module):
    """Of an activation, calibrated: uint8, its zero is 3."""

    dtype = torch.uint8

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def calculate_qparams(self):
        return torch.tensor(self.scale), torch.tensor(3)

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, self.scale, 3, 0, 255)


def chain(x, *steps):
    """The calibrated graph of `steps`, one after the other: by which scale is rounded, or an operator and what else it takes."""
    root, graph = nn.Module(), fx.Graph()
    node = graph.placeholder("pixels")
    for index, step in enumerate([*steps, *GRID]):
        if isinstance(step, float):
            root.add_module(f"activation_post_process_{index}", Observer(step))
            node, x = graph.call_module(f"activation_post_process_{index}", (node,)), Observer(step)(x)
        else:
            target, *others = step
            names = []
            for place, other in enumerate(others):
                if isinstance(other, torch.Tensor):
                    root.register_buffer(f"given_{index}_{place}", other)
                names.append(graph.get_attr(f"given_{index}_{place}") if isinstance(other, torch.Tensor) else other)
            node, x = graph.call_function(target, (node, *names)), target(x, *others)
        node.meta["val"] = x
    graph.output((node,))
    return fx.GraphModule(root, graph), x


def written(x, *steps):
    """The operators that ONNX has for them, what ONNX Runtime computes of x, and what PyTorch does."""
    graph, grid = chain(x, *steps)
    config = SimpleNamespace(image_size=x.shape[2], grid=math.isqrt(grid.shape[1]), channels=grid.shape[2])
    proto = quantized_encoder(SimpleNamespace(config=config), graph)
    return [node.op_type for node in proto.graph.node], computed(proto, x), grid.numpy()


def computed(proto, x):
    onnx.checker.check_model(graphs.clean(proto))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), runtime.session_options(1), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": x.numpy()})[0]


def uniform(least, most, *shape):
    return torch.empty(shape).uniform_(least, most, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("side", "step", "roundings"), [(2, 0.05, 2), (3, 0.1, 2), (1, 0.1, 1), (1, 0.2, 2)])
def test_pools_between_roundings_are_convolutions_with_ones(side, step, roundings):
    """By hand: the mean of the quantized values, rounded to the next step. One over single pixels goes, where it rounds nothing."""
    x = uniform(-0.3, 12, 2, 3, 12, 12)
    made, found, _ = written(x, 0.1, (aten.avg_pool2d.default, [side, side], [side, side]), step, (aten.relu.default,))
    assert "AveragePool" not in made and made.count("Conv") == roundings - 1 and made.count("QuantizeLinear") == roundings
    integers = np.clip(np.round(x.numpy().astype(np.float64) / np.float32(0.1)) + 3, 0, 255) - 3
    mean = integers.reshape(2, 3, 12 // side, side, 12 // side, side).mean((3, 5)) * np.float64(np.float32(0.1))
    wanted = np.maximum(np.clip(np.round(mean / np.float32(step)) + 3, 0, 255) - 3, 0) * step
    wanted = wanted.reshape(2, 3, -1).swapaxes(1, 2)
    assert np.abs(found - wanted).max() <= step * 1.001 and np.mean(np.abs(found - wanted) > step / 2) < 0.02  # ties alone


def test_a_pool_over_single_pixels_that_leaves_some_out_does_not_go():
    x = uniform(0, 12, 1, 3, 6, 6)
    made, found, _ = written(x, 0.1, (aten.avg_pool2d.default, [1, 1], [2, 2]), 0.1)
    assert made.count("Conv") == 1
    np.testing.assert_allclose(found, x[:, :, ::2, ::2].flatten(2).transpose(1, 2), atol=0.051)


@pytest.mark.parametrize("more", [([2, 2],), ([2, 2], False, False)])
def test_a_pool_that_is_no_plain_mean_stays(more):
    made, found, wanted = written(uniform(0, 12, 1, 3, 12, 12), 0.1, (aten.avg_pool2d.default, [5, 5], [5, 5], *more), 0.1)
    assert made.count("AveragePool") == 1 and "Conv" not in made
    np.testing.assert_allclose(found, wanted, atol=0.101)


def test_the_windows_of_a_pool_that_names_no_stride_lie_side_by_side():
    made, found, wanted = written(uniform(0, 12, 1, 3, 12, 12), 0.1, (aten.avg_pool2d.default, [2, 2]), 0.1)
    assert made.count("Conv") == 1
    np.testing.assert_allclose(found, wanted, atol=0.101)


def test_a_pool_of_what_is_not_rounded_stays():
    made, found, wanted = written(uniform(-2, 2, 1, 3, 12, 12), (aten.avg_pool2d.default, [2, 2]))
    assert made[0] == "AveragePool" and "Conv" not in made
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("before", [True, False])
def test_a_convolution_pads_by_itself_what_was_padded_before_it(before):
    """Other widths on each side, twice; zeros are exact, so that what was rounded is not rounded anew for them, by whichever scale."""
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    pads = [(aten.pad.default, [1, 2, 3, 0]), (aten.pad.default, [0, 1, 2, 4])]
    convolution = (aten.conv2d.default, kernel, None, [1, 1], [1, 1])
    x = uniform(-0.1, 5, 2, 3, 8, 14)[..., :8]
    made, found, wanted = written(x, *([0.03, *pads, 0.05] if before else [*pads, 0.03]), convolution)
    assert made[:3] == ["QuantizeLinear", "DequantizeLinear", "Conv"] and "Pad" not in made and made.count("QuantizeLinear") == 1
    if before:
        _, _, wanted = written(x, 0.03, *pads, convolution)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("steps", "said"), [
    ([(aten.pad.default, [0, 1, 0, 1]), (aten.relu.default,)], r"relu.* has no form in ONNX here"),
    ([(aten.pad.default, [0, 1, 0, 1], "reflect")], "pads otherwise than with zeros"),
    ([(aten.pad.default, [0, 1, 0, 1], "constant", 1.0)], "pads otherwise than with zeros"),
    ([(aten.pad.default, [0, 1])], "pads otherwise than with zeros"),
    ([(aten.pad.default, [0, -1, 0, -1])], "pads otherwise than with zeros"),
    ([(aten.avg_pool2d.default, [3, 3], [3, 3], [0, 0], True)], "rounds sizes up"),
    ([(aten.sigmoid.default,)], r"sigmoid.* has no form in ONNX here"),
])
def test_what_has_no_form_in_onnx_is_named(steps, said):
    with pytest.raises(StageError, match=said):
        written(uniform(0, 1, 1, 3, 8, 8), *steps)


class Network(nn.Module):
    """What encoders are made of: a norm behind a convolution with a bias and one without, an activation, maybe in place, and a sum."""

    def __init__(self, activation=None):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=True), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(8, eps=0.1, affine=False)
        self.activation = activation
        for norm in (self.norm1, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm1.weight)
        nn.init.normal_(self.norm1.bias)

    def forward(self, x):
        x = self.norm1(self.first(x))
        y = self.activation(x)
        return self.norm2(self.second(y)) + x


class Shared(Network):
    """Its second convolution is run twice, the first time with a norm behind it."""

    def forward(self, x):
        x = self.first(x)
        return self.second(self.norm2(self.second(x)))


class NotAlone(Network):
    def forward(self, x):
        x = self.first(x)
        return self.norm1(x) + x


def float_graph(network):
    return encoder_graph(SimpleNamespace(encoder=network.eval(), config=SimpleNamespace(image_size=16, grid=8, channels=8)))


@pytest.mark.parametrize("network", [
    Network(nn.ReLU(inplace=True)), Network(nn.ReLU()), Network(nn.ReLU6(inplace=True)), Network(nn.Hardtanh()),
    Network(nn.Hardtanh(-0.5, 0.1)), Network(nn.ReLU()).to(memory_format=torch.channels_last), Shared(),
])
def test_a_float_encoder_is_pytorchs(network):
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    proto = float_graph(network)
    assert [node.op_type for node in proto.graph.node if "Norm" in node.op_type] == []
    with torch.no_grad():
        wanted = network(x).flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(computed(proto, x), wanted, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_a_norm_that_does_not_read_a_convolution_alone_is_named():
    with pytest.raises(StageError, match="batch_norm.* has no form in ONNX here"):
        float_graph(NotAlone())
