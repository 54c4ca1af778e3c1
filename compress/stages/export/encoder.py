"""The encoder as an ONNX graph, written from the operators that torch.export lists of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.utils.fusion import fuse_conv_bn_weights

from compress.errors import StageError
from compress.stages.export.modules import Encoder
from compress.stages.export.writer import Writer, ints
from students.lightcap import LightCap
from students.lightcap.config import LightCapConfig

aten = torch.ops.aten


class Value(NamedTuple):
    """A tensor of the graph: its name there; zeros [top, left, bottom, right] to be added around it; scale and zero point, if rounded."""

    name: str
    pads: tuple[int, ...] = (0, 0, 0, 0)
    rounding: tuple[float, int] | None = None


Operator = Callable[..., Value]  # of the writer, the node, and the node's arguments, Values in the place of nodes


def encoder_graph(model: LightCap) -> ModelProto:
    """pixels (n, 3, S, S) -> grid (n, G, C)."""
    size = model.config.image_size
    with torch.no_grad():
        traced = torch.export.export(Encoder(model.encoder).eval(), (torch.zeros(2, 3, size, size),), strict=False)
    graph = traced.module(check_guards=False)
    fold_norms(graph)
    return graph_of(graph, model.config, OPERATORS)


@torch.no_grad()
def fold_norms(graph: GraphModule) -> None:
    """Makes each batch norm that alone reads a convolution part of it, in place."""
    for norm in [node for node in graph.graph.nodes if node.target is aten.batch_norm.default]:
        conv = norm.args[0]
        if conv.target is not aten.conv2d.default or len(conv.users) > 1:
            continue
        read = [*(*conv.args, None)[1:3], *norm.args[1:5]]  # a convolution may have no bias, a norm no scale and shift
        weight, bias, scale, shift, mean, variance = (None if node is None else attrgetter(str(node.target))(graph) for node in read)
        folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.args[7], scale, shift)
        names = [f"{conv.name}_{part}" for part in ("weight", "bias")]
        with graph.graph.inserting_before(conv):
            for name, tensor in zip(names, folded, strict=True):
                graph.register_buffer(name, tensor)
            conv.args = (conv.args[0], *map(graph.graph.get_attr, names), *conv.args[3:])
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)


def graph_of(graph: GraphModule, config: LightCapConfig, operators: Mapping, observer: Operator | None = None) -> ModelProto:
    """The ONNX graph of an encoder's. `operators`: what writes each operator; `observer`: what writes an observer of a calibrated graph.
    StageError naming an operator that is none of them."""
    tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    write, values = Writer(dict(tensors)), {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = Value("pixels")
        elif node.op == "get_attr":
            values[node] = Value(str(node.target))
        elif node.op == "output":
            write.rename(values[node.all_input_nodes[0]].name, "grid")
        elif node.op == "call_module":
            values[node] = observer(write, node, values[node.args[0]])
        else:
            operator = operators.get(node.target)
            if operator is None or (node.target not in READ_PADS and any(any(values[source].pads) for source in node.all_input_nodes)):
                raise StageError(f"the encoder's {node.target} ({node.name}) has no form in ONNX here")
            values[node] = operator(write, node, *map_arg(node.args, values.get), **node.kwargs)
    pixels, grid = ("n", 3, config.image_size, config.image_size), ("n", config.grid**2, config.channels)
    return write.model({"pixels": (TensorProto.FLOAT, pixels)}, {"grid": (TensorProto.FLOAT, grid)})


def convolution(
    write: Writer, node: Node, x: Value, weight: Value, bias: Value | None = None, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> Value:
    inputs = [value.name for value in (x, weight, bias) if value is not None]
    pads = [own + more for own, more in zip([*padding, *padding], x.pads, strict=True)]
    return Value(write("Conv", *inputs, strides=list(stride), pads=pads, dilations=list(dilation), group=groups))


def pad(write: Writer, node: Node, x: Value, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Zeros that the convolutions behind it add themselves. (EfficientNet's strided ones have more on one side than on the other, which
    PyTorch spells as a pad.) `widths`: left, right, top, bottom."""
    if mode != "constant" or value or len(widths) != 4 or min(widths) < 0:
        raise StageError(f"the encoder's {node.name} pads otherwise than with zeros around a picture")
    left, right, top, bottom = widths
    return x._replace(pads=tuple(own + more for own, more in zip(x.pads, (top, left, bottom, right), strict=True)))


def pool(
    write: Writer, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
    ceil: bool = False, counts_pads: bool = True,
) -> Value:
    """Windows of one pixel, one apart, change nothing and are left out (CLIP's ResNet-50 has such a pool)."""
    if ceil:
        raise StageError(f"the encoder's {node.name} rounds sizes up, where PyTorch and ONNX Runtime divide by other counts")
    if is_identity(kernel, stride):
        return x
    shape = {"kernel_shape": list(kernel), "strides": list(stride or kernel), "pads": [*padding, *padding]}
    return Value(write("AveragePool", x.name, **shape, count_include_pad=int(counts_pads)))


def is_identity(kernel: Sequence[int], stride: Sequence[int]) -> bool:
    return {*kernel, *stride} == {1}


def clip(write: Writer, node: Node, x: Value, least: float = -1.0, most: float = 1.0) -> Value:
    return Value(write("Clip", x.name, np.array(least, np.float32), np.array(most, np.float32)))


def flatten(write: Writer, node: Node, x: Value, start: int) -> Value:
    return Value(write("Reshape", x.name, ints(*[0] * start, -1)))


def transpose(write: Writer, node: Node, x: Value, first: int, second: int) -> Value:
    axes = list(range(node.meta["val"].dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return Value(write("Transpose", x.name, perm=axes))


def relu(write: Writer, node: Node, x: Value) -> Value:
    return Value(write("Relu", x.name))


def add(write: Writer, node: Node, x: Value, y: Value) -> Value:
    return Value(write("Add", x.name, y.name))


READ_PADS = {aten.pad.default, aten.conv2d.default}
OPERATORS: dict = {
    aten.conv2d.default: convolution, aten.pad.default: pad, aten.avg_pool2d.default: pool, aten.add.Tensor: add, aten.add_.Tensor: add,
    aten.relu.default: relu, aten.relu_.default: relu, aten.hardtanh.default: clip, aten.hardtanh_.default: clip,
    aten.flatten.using_ints: flatten, aten.transpose.int: transpose,
}
