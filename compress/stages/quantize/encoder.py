"""The INT8 encoder: calibrated and folded in PyTorch, exported with Quantize/DequantizeLinear, all integer kernels in ONNX Runtime."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection, Iterable

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, shape_inference
from torch.export import Dim
from torch.fx import GraphModule

from compress import graphs
from compress.stages.export.modules import Encoder
from compress.stages.export.tracing import to_onnx
from compress.stages.quantize import observe
from compress.stages.quantize.simulate import leave_float
from students.lightcap import LightCap


def calibrated(model: LightCap, batches: Iterable[np.ndarray], reduce_range: bool = False) -> GraphModule:
    """The encoder with observers that saw `batches` of pixels (B, 3, S, S) float32."""
    inputs, shapes = example(model)
    prepared = observe.prepare(Encoder(model), inputs, shapes, reduce_range)
    observe.observe_everything(prepared)
    observe.run(prepared, ((torch.from_numpy(batch),) for batch in batches))
    observe.hold_biases(prepared)
    return prepared


def example(model: LightCap) -> tuple[tuple, tuple]:
    """Inputs to trace the encoder with, and which of their sizes may change."""
    size = model.config.image_size
    return (torch.zeros(2, 3, size, size),), ({0: Dim("images", min=1, max=4096)},)


def quantized_encoder(model: LightCap, prepared: GraphModule, floating: Collection[str] = ()) -> ModelProto:
    """pixels -> grid with one set of scales, those that `prepared` saw; `floating`: parts (`simulate.parts`) that stay in float."""
    inputs, shapes = example(model)
    proto = to_onnx(fold(leave_float(prepared, floating)), inputs, ["pixels"], ["grid"], shapes)
    fold_pads(proto.graph)
    integer_pools(proto)
    graphs.own_zero_points(proto.graph)
    return proto


def fold(prepared: GraphModule) -> GraphModule:
    """`prepared`, changed in place, by torchao's conversion with integer weights, rounded as their offsets say. neural-compressor's own
    `convert` drops `fold_quantize`, and every weight stays fp32."""
    observe.add_offsets(prepared)
    with warnings.catch_warnings():
        for origin in ("torch", "torchao"):
            warnings.filterwarnings("ignore", module=rf"{origin}(\.|$)")
        folded = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e").convert_pt2e(prepared, fold_quantize=True)
    folded.training = False  # PT2E graphs have no eval(); the exporter asks
    return folded


def fold_pads(graph: GraphProto) -> None:
    """Pad -> Quantize -> Dequantize -> Conv becomes Quantize -> Dequantize -> Conv that pads by itself, in place. Zeros stay exact: they
    are the zero point. (EfficientNet's strided convolutions pad more on one side than on the other, which PyTorch spells as a Pad.)"""
    weights, made, readers = graphs.initializers(graph), graphs.producers(graph), graphs.consumers(graph)
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        widths = spatial_pads(pad, weights)
        chain = quantized_readers(pad, readers)
        if widths is None or chain is None:
            continue
        quantize, dequantize, convolutions = chain
        source = made.get(pad.input[0])
        if source is not None and source.op_type == "DequantizeLinear":
            for node in convolutions:
                node.input[0] = pad.input[0]
        else:
            quantize.input[0] = pad.input[0]
        for node in convolutions:
            own = next(item for item in node.attribute if item.name == "pads")
            own.CopyFrom(helper.make_attribute("pads", [int(a + b) for a, b in zip(own.ints, widths, strict=True)]))
    graphs.prune_unused(graph)


def spatial_pads(pad: NodeProto, weights: dict) -> list[int] | None:
    """[top, left, bottom, right] of a constant zero Pad on the last two of four axes, else None."""
    if graphs.attribute(pad, "mode", b"constant") != b"constant" or pad.input[1] not in weights or len(pad.input) > 3 and pad.input[3]:
        return None
    value = weights.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
    widths = numpy_helper.to_array(weights[pad.input[1]]).tolist()
    if value is not None and numpy_helper.to_array(value) != 0 or len(widths) != 8 or any(widths[i] for i in (0, 1, 4, 5)):
        return None
    return [widths[i] for i in (2, 3, 6, 7)]


def quantized_readers(pad: NodeProto, readers: dict) -> tuple[NodeProto, NodeProto, list[NodeProto]] | None:
    """The Quantize and Dequantize that alone read `pad`, and the convolutions that alone read them."""
    first = readers.get(pad.output[0], [])
    second = readers.get(first[0].output[0], []) if len(first) == 1 and first[0].op_type == "QuantizeLinear" else []
    last = readers.get(second[0].output[0], []) if len(second) == 1 and second[0].op_type == "DequantizeLinear" else []
    return (first[0], second[0], last) if last and all(node.op_type == "Conv" for node in last) else None


def integer_pools(proto: ModelProto) -> None:
    """Average pools between two quantizations become depthwise convolutions with ones, in place: the same sums, scaled by 1 / k^2. ONNX
    Runtime's own integer pool is slow: with it CLIP's ResNet-50 took 25 ms, and takes 21 without (benchmarks/latency.py). A pool that takes
    every pixel by itself (there is one in that network) goes."""
    graph = proto.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in shape_inference.infer_shapes(proto).graph.value_info}
    weights, made, readers = graphs.initializers(graph), graphs.producers(graph), graphs.consumers(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        side = plain_pool(node)
        before, after = made.get(node.input[0]) if side else None, readers.get(node.output[0], [])
        if before is None or before.op_type != "DequantizeLinear" or [reader.op_type for reader in after] != ["QuantizeLinear"]:
            nodes.append(node)
            continue
        same = all(numpy_helper.to_array(weights[a]) == numpy_helper.to_array(weights[b])
                   for a, b in zip(before.input[1:], after[0].input[1:], strict=True))
        strides = list(graphs.attribute(node, "strides"))
        if side == 1 and strides == [1, 1] and same and (read := readers.get(after[0].output[0], [])):
            for reader in (reader for dequantize in read for reader in readers.get(dequantize.output[0], [])):
                for place, name in enumerate(reader.input):
                    if name in {dequantize.output[0] for dequantize in read}:
                        reader.input[place] = node.input[0]
            continue
        count, name = shapes[node.input[0]][1].dim_value, node.output[0]
        ones = graphs.add_initializer(graph, f"{name}_ones", np.ones((count, 1, side, side), np.int8))
        scale = graphs.add_initializer(graph, f"{name}_share", np.full(count, 1 / side**2, np.float32))
        point = graphs.add_initializer(graph, f"{name}_point", np.zeros(count, np.int8))
        nodes += [
            helper.make_node("DequantizeLinear", [ones, scale, point], [f"{name}_weight"], axis=0),
            helper.make_node("Conv", [node.input[0], f"{name}_weight"], [name], group=count, kernel_shape=[side, side], strides=strides,
                             pads=[0, 0, 0, 0]),
        ]
    graphs.replace_nodes(graph, nodes)
    graphs.prune_unused(graph)


def plain_pool(node: NodeProto) -> int | None:
    """The side of an AveragePool's square window, where it pads nothing and rounds sizes down; else None."""
    shape = graphs.attribute(node, "kernel_shape") if node.op_type == "AveragePool" else None
    padded = any(graphs.attribute(node, "pads", [])) or graphs.attribute(node, "ceil_mode", 0)
    plain = graphs.attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and graphs.attribute(node, "strides") is not None
    return shape[0] if shape and len(shape) == 2 and shape[0] == shape[1] and not padded and plain else None
