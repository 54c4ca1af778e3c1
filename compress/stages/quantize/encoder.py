"""The INT8 encoder: calibrated in PyTorch, written with Quantize/DequantizeLinear, all integer kernels in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from onnx import ModelProto
from torch.export import Dim
from torch.fx import GraphModule, Node

from compress.stages.export.encoder import OPERATORS, Value, convolution, graph_of, is_identity, pool
from compress.stages.export.modules import Encoder
from compress.stages.export.writer import Writer
from compress.stages.quantize import observe
from compress.stages.quantize.observe import aten, is_observer, rounding_of
from compress.stages.quantize.simulate import leave_float
from students.lightcap import LightCap


def calibrated(model: LightCap, batches: Iterable[np.ndarray], reduce_range: bool = False) -> GraphModule:
    """The encoder with observers that saw `batches` of pixels (B, 3, S, S) float32."""
    size = model.config.image_size
    inputs, shapes = (torch.zeros(2, 3, size, size),), ({0: Dim("images", min=1, max=4096)},)
    prepared = observe.prepare(Encoder(model.encoder), inputs, shapes, reduce_range)
    observe.observe_everything(prepared)
    observe.run(prepared, ((torch.from_numpy(batch),) for batch in batches))
    observe.hold_biases(prepared)
    return prepared


def quantized_encoder(model: LightCap, prepared: GraphModule, floating: Collection[str] = ()) -> ModelProto:
    """pixels -> grid with one set of scales, those that `prepared` saw; `floating`: parts (`simulate.parts`) that stay in float."""
    graph = leave_float(prepared, floating)
    return graph_of(graph, model.config, OPERATORS | {aten.avg_pool2d.default: partial(integer_pool, graph)}, partial(observed, graph))


def observed(graph: GraphModule, write: Writer, node: Node, x: Value) -> Value:
    """What the observer `node` saw: a weight as its integers, an activation rounded, unless it was so already; nor is it rounded anew for
    the zeros around it, which are exact: they are the zero point."""
    observer = graph.get_submodule(node.target)
    if observer.dtype == torch.int8:
        scale, integers = observe.rounded_weight(graph, node)
        return integer_weight(write, x.name, integers, scale)
    rounding = rounding_of(observer)
    if x.rounding == rounding or (x.rounding is not None and any(x.pads)):
        return x
    step = np.array(rounding[0], np.float32), np.array(rounding[1], np.uint8)
    return Value(write("DequantizeLinear", write("QuantizeLinear", x.name, *step), *step), x.pads, rounding)


def integer_pool(
    graph: GraphModule, write: Writer, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0), *rest,
) -> Value:
    """An average pool between two roundings as a depthwise convolution with ones: the same sums, scaled by 1 / k^2. ONNX Runtime's own
    integer pool is slower."""
    roundings = {rounding_of(graph.get_submodule(user.target)) if is_observer(user) else None for user in node.users} | {x.rounding}
    if any(padding) or rest or None in roundings or (is_identity(kernel, stride) and len(roundings) == 1):
        return pool(write, node, x, kernel, stride, padding, *rest)
    count, area = node.meta["val"].shape[1], np.prod(kernel)
    ones = integer_weight(write, node.name, np.ones((count, 1, *kernel), np.int8), np.full(count, 1 / area))
    return convolution(write, node, x, ones, None, stride or kernel, groups=count)


def integer_weight(write: Writer, name: str, integers: np.ndarray, scale: np.ndarray) -> Value:
    """Its zero point is its own: where a processor needs unsigned weights (`runtime.session_options`), ONNX Runtime replaces both, and does
    not open a graph in which one is to be replaced twice."""
    parts = {"integers": integers, "scale": scale.astype(np.float32), "point": np.zeros(len(scale), np.int8)}
    return Value(write("DequantizeLinear", *(write.weight(f"{name}.{part}", value) for part, value in parts.items()), axis=0))
