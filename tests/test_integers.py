"""PyTorch's integer graph against what ONNX Runtime makes of the same calibration, and its float functions against closed forms."""

import functools

import integers
import mlas
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from integers import integer
from onnx import TensorProto, helper, numpy_helper

from compress import graphs, runtime
from compress.stages.quantize import encoder, observe, simulate
from students.lightcap import LightCap, preset

aten = torch.ops.aten
UNIT = 2.0**-24  # half of a last bit, relative


def runtimes(kind: str, inputs: dict[str, torch.Tensor], **attributes) -> torch.Tensor:
    """One operator by ONNX Runtime."""
    names = list(inputs)
    nodes = [helper.make_node(kind, names, ["y"], **attributes)]
    given = [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, inputs[names[0]].shape)]
    weights = [numpy_helper.from_array(inputs[name].numpy(), name) for name in names[1:]]
    graph = helper.make_graph(nodes, kind, given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {names[0]: inputs[names[0]].numpy()})[0])


def spread(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_float_functions_are_those_of_their_names():
    """Within some last bits of float64."""
    x, weight, bias = spread((50, 72)), spread((72,), 1), spread((72,), 2)
    ours = {
        "gelu": (mlas.gelu(x), F.gelu(x.double())),
        "erf": (mlas.erf(x), torch.erf(x.double())),
        "sigmoid": (mlas.sigmoid(x), torch.sigmoid(x.double())),
        "softmax": (mlas.softmax(x), x.double().softmax(-1)),
        "layer_norm": (mlas.layer_norm(x, [72], weight, bias, 1e-5),
                       F.layer_norm(x.double(), [72], weight.double(), bias.double(), 1e-5)),
    }
    for name, (mine, exact) in ours.items():
        assert (mine - exact).abs().max() <= 8 * UNIT * exact.abs().max(), name
    torch.testing.assert_close(mlas.exp(-x.abs()), torch.exp(-x.abs().double()).float(), rtol=4 * UNIT, atol=0)
    assert mlas.exp(torch.tensor([0.0, -200.0])).tolist() == pytest.approx([1.0, 0.0], abs=1e-40)


@pytest.mark.parametrize("width", [8, 12, 69, 100, 216, 308, 384])
def test_float_functions_are_those_of_the_runtime(width):
    """To the last bit on x86 with FMA, of the version that mlas.py names: another one's are to be written there."""
    x, weight, bias = spread((50, width)), spread((width,), 1), spread((width,), 2)
    pairs = {
        "Gelu": (mlas.gelu(x), runtimes("Gelu", {"x": x})),
        "Sigmoid": (mlas.sigmoid(x), runtimes("Sigmoid", {"x": x})),
        "Softmax": (mlas.softmax(x), runtimes("Softmax", {"x": x}, axis=-1)),
        "LayerNormalization": (mlas.layer_norm(x, [width], weight, bias, 1e-5),
                               runtimes("LayerNormalization", {"x": x, "weight": weight, "bias": bias}, axis=-1, epsilon=1e-5)),
    }
    for name, (mine, theirs) in pairs.items():
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert torch.equal(mine, theirs), name
        else:
            assert (mine - theirs).abs().max() <= 8 * UNIT * theirs.abs().max(), name


def test_attention_is_pytorchs():
    query, key, value = (spread((2, 3, 7, 8), seed) for seed in range(3))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask[..., :4] = True
    torch.testing.assert_close(mlas.attention(query, key, value, mask, 4), F.scaled_dot_product_attention(query, key, value, mask))


@functools.cache
def calibrated_encoder(name: str) -> tuple[LightCap, torch.fx.GraphModule, np.ndarray]:
    torch.manual_seed(3)
    model = LightCap(preset("tiny", encoder=name, vocabulary=40)).eval()
    side = model.config.image_size
    pixels = np.random.default_rng(0).normal(size=(4, 3, side, side)).astype(np.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model, encoder.calibrated(model, [pixels]), pixels


@pytest.mark.parametrize(("name", "kinds"), [
    pytest.param("efficientnet-lite0", (49, 9), marks=pytest.mark.slow), ("resnet-small", (11 + 3, 3))
])
def test_the_encoder_gives_the_grids_of_onnx_runtime(name, kinds, tmp_path):
    """Strided convolutions with pads, ReLU6 and sums; of a ResNet pools and ReLUs behind sums. On processors without FMA some sums that
    end in a half are rounded to the other side."""
    model, calibrated, pixels = calibrated_encoder(name)
    graph = integer(simulate.simulated(calibrated))
    made = [type(module) for module in graph.modules()]
    left = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert not left & (integers.PRODUCTS | integers.SUMS | observe.ACTIVATIONS)
    assert (made.count(integers.Product), made.count(integers.Sum)) == kinds
    path = tmp_path / "encoder.onnx"
    graphs.write(graphs.clean(encoder.quantized_encoder(model, calibrated)), path)
    theirs = runtime.open_session(path, runtime.session_options(1)).run(None, {"pixels": pixels})[0]
    with torch.no_grad():
        grid = graph(torch.from_numpy(pixels)).numpy()
        near = simulate.simulated(calibrated)(torch.from_numpy(pixels)).numpy()
    assert len(np.unique(theirs)) > 50
    wrong = float((grid != theirs).mean())
    assert wrong < 0.02 and wrong <= float((near != theirs).mean())


def test_what_is_rounded_on_one_side_alone_stays_float():
    """A part that is left in float keeps its products, and the rest its integers."""
    _, encoding, pixels = calibrated_encoder("resnet-small")
    graph = integer(simulate.simulated(simulate.leave_float(encoding, ("encoder.blocks.1",))))
    left = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert left.count(aten.conv2d.default) > 0 and any(isinstance(module, integers.Product) for module in graph.modules())
    with torch.no_grad():
        grid = graph(torch.from_numpy(pixels))
        near = simulate.simulated(simulate.leave_float(encoding, ("encoder.blocks.1",)))(torch.from_numpy(pixels))
    assert float((grid - near).square().mean()) < 1e-2 * float(near.var())
