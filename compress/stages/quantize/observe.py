"""Calibration by neural-compressor: PT2E graphs with observers, run over training images, asked for their scales."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from students.lightcap import LightCap

aten = torch.ops.aten
ACTIVATIONS = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default}
ARITHMETIC = {aten.conv2d.default, aten.add.Tensor, aten.add_.Tensor, aten.avg_pool2d.default}

# By these torchao's quantizer knows what it fuses.
SOURCES = {aten.conv2d.default: F.conv2d, aten.linear.default: F.linear, aten.relu.default: F.relu, aten.relu_.default: F.relu}

# x86 processors without VNNI add two products of uint8 and int8 in 16 bits: 2 x 255 x 128 saturates there, 2 x 255 x 64 = 32,640 does not.
SEVEN_BITS = (-64, 63)

# ONNX Runtime adds up a convolution's products, and its bias, in int32, in steps of input scale times weight scale.
LARGEST_BIAS = 2.0**30


@dataclass(frozen=True)
class Scales:
    """One Linear: its input's scale and zero point (uint8), its weight's scale per output (int8, symmetric) and its integers (out, in)."""

    scale: float
    zero_point: int
    weight: np.ndarray
    integers: np.ndarray


class TeacherForced(nn.Module):
    """The decoder over whole captions, as calibration sees it."""

    def __init__(self, model: LightCap) -> None:
        super().__init__()
        self.model = model

    def forward(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, concepts: Tensor | None = None) -> Tensor:
        return self.model.heads(self.model.states(grid, tokens, positions, mask, concepts=concepts), self.model.word)


def prepare(module: nn.Module, inputs: tuple, dynamic_shapes, reduce_range: bool = False) -> GraphModule:
    """neural-compressor's static INT8 preparation: uint8 activations per tensor, int8 weights per output channel. Its histogram observers
    ("kl") clip rare extremes: EfficientNet-Lite0's grids came out nearer to the float ones than with the range of all values.

    `reduce_range`: weights of 7 bits. neural-compressor has no setting for it, and torchao's own takes the bit from the activations, which
    QuantizeLinear does not keep to: it clips at 255, whatever was calibrated."""
    with warnings.catch_warnings():
        for origin in ("torch", "torchao", "neural_compressor", "copyreg"):
            warnings.filterwarnings("ignore", module=rf"{origin}(\.|$)")
        quantization = neural_compressor()
        exported = export(module.eval(), inputs, dynamic_shapes)
        prepared = quantization.prepare(exported, quantization.StaticQuantConfig(act_algo="kl"), example_inputs=inputs)
    if reduce_range:
        for observer in weight_observers(prepared):
            observer.quant_min, observer.quant_max = SEVEN_BITS
    return prepared


def weight_observers(prepared: GraphModule) -> list[nn.Module]:
    """What watches weights: the observers of int8; activations are uint8."""
    observers = {prepared.get_submodule(node.target) for node in prepared.graph.nodes if is_observer(node)}
    return [observer for observer in observers if observer.dtype == torch.int8]


def neural_compressor():
    """Its module `quantization`, without its running commentary on every step and on accelerators."""
    importlib.import_module("torchao")  # whose quantizer and observers it takes; by name, so that a lock holds the version
    importlib.import_module("neural_compressor.common")
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    return importlib.import_module("neural_compressor.torch.quantization")


@torch.no_grad()
def export(module: nn.Module, inputs: tuple, dynamic_shapes) -> GraphModule:
    """The graph that neural-compressor's own `export` gives (but for the order in which weights are listed), sooner: that traces by
    Dynamo, which notes of each operator where it comes from."""
    graph = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False).module(check_guards=False)
    for node in graph.graph.nodes:
        if node.target in SOURCES:
            node.meta["source_fn_stack"] = [(node.name, SOURCES[node.target])]
    graph.graph.eliminate_dead_code()  # weights that nothing reads
    graph.delete_all_unused_submodules()
    graph._exported, graph.dynamic_shapes = True, dynamic_shapes  # neural-compressor's marks
    return graph


def run(prepared: GraphModule, batches: Iterable[tuple]) -> None:
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)


def rounding_of(observer: nn.Module) -> tuple[float, int]:
    """Scale and zero point of an activation's observer."""
    scale, zero_point = observer.calculate_qparams()
    return float(scale), int(zero_point)


def is_observer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


def observe_everything(prepared: GraphModule) -> None:
    """Adds an observer to each convolution, addition and pooling whose result (after its activation) something reads unobserved, in place.

    The x86 recipe leaves the convolution that ends a residual branch in float, since the compiler it is made for fuses it with the
    addition. ONNX Runtime runs such a convolution as an integer one only if its output is quantized as well.
    """
    pattern = next(module for name, module in prepared.named_modules() if name == "activation_post_process_0")
    added = 0
    for node in list(prepared.graph.nodes):
        if node.op != "call_function" or node.target not in ARITHMETIC | ACTIVATIONS:
            continue
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_function" and users[0].target in ACTIVATIONS:
            continue  # the activation's own result is observed instead
        observers = [user for user in users if is_observer(user)]
        rest = [user for user in users if user not in observers]
        if not rest:
            continue
        if observers:
            observer = observers[0]
        else:
            name = f"activation_post_process_added_{added}"
            added += 1
            prepared.add_submodule(name, fresh(pattern))
            with prepared.graph.inserting_after(node):
                observer = prepared.graph.call_module(name, (node,))
        for user in rest:
            user.replace_input_with(node, observer)
    prepared.graph.lint()
    prepared.recompile()


@torch.no_grad()
def hold_biases(prepared: GraphModule) -> None:
    """Raises the least scale (`eps`) of the weights of each convolution that reads something calibrated, in place, channel by channel, so
    that its bias is no more than LARGEST_BIAS steps.

    A channel of weights near zero (ImageNet's EfficientNet-Lite0 has such) has steps so small that its bias passes int32: ONNX Runtime
    makes -2^31 of it, and a channel that is always off comes on. Steps as large as this move a sum of K products by less than the bias
    times K / 8,000,000."""
    for node in prepared.graph.nodes:
        if node.op != "call_function" or node.target is not aten.conv2d.default or len(node.args) < 3 or node.args[2] is None:
            continue
        source, weight, bias = node.args[:3]
        if is_observer(source) and is_observer(weight):
            scale, _ = prepared.get_submodule(source.target).calculate_qparams()
            observer = prepared.get_submodule(weight.target)
            observer.eps = torch.maximum(observer.eps, attrgetter(str(bias.target))(prepared).abs() / (LARGEST_BIAS * scale))


def fresh(observer: nn.Module) -> nn.Module:
    """Another observer of the same kind and settings, which has seen nothing."""
    return type(observer)(
        dtype=observer.dtype, qscheme=observer.qscheme, quant_min=observer.quant_min, quant_max=observer.quant_max, eps=float(observer.eps)
    )


def linear_scales(prepared: GraphModule) -> dict[str, Scales]:
    """The calibrated scales of every Linear, by the name of its weight, and the integers that PyTorch rounds it to."""
    found: dict[str, Scales] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        source, weight = node.args[0], node.args[1]
        if is_observer(source) and is_observer(weight):
            rounding = rounding_of(prepared.get_submodule(source.target))
            found[str(weight.args[0].target)] = Scales(*rounding, *rounded_weight(prepared, weight))
    return found


@torch.no_grad()
def rounded_weight(prepared: GraphModule, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """What the observer `node` makes of its weight: scales (out,) float64, integers (out, ...) int8, rounded as its `offset` says."""
    observer = prepared.get_submodule(node.target)
    scale, _ = observer.calculate_qparams()
    values = attrgetter(str(node.args[0].target))(prepared) + getattr(observer, "offset", 0.0)
    # PyTorch multiplies by 1 / scale. To divide would round ties, such as a row's greatest weight at 127.5, otherwise.
    integers = (values * (1 / scale).view(-1, *[1] * (values.dim() - 1))).round().clamp(observer.quant_min, observer.quant_max)
    return scale.double().numpy(), integers.to(torch.int8).numpy()
