"""The INT8 decoder: the float graphs of prefix and step with every product against a weight made an integer one, by scales that
neural-compressor calibrated.

A Linear is QuantizeLinear, MatMulInteger, Cast, Mul, Add: ONNX Runtime multiplies integers there, where Dequantize -> MatMul -> Add is
rewritten to a float Gemm that dequantizes its weight at every call. The word embedding stays one initializer, INT8 with one scale per
word, for lookup and for logits. Norms, softmax, the products of attention, GELU and the logits are float.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from compress import graphs
from compress.errors import StageError
from compress.stages.export.decoder import prefix_graph, stacks, step_graph
from compress.stages.quantize import observe
from compress.stages.quantize.observe import Scales
from compress.stages.quantize.simulate import part_named
from compress.training.batches import Captions, pack
from students.lightcap import LightCap

LONGEST = 4096  # tokens of all captions of one calibration image


def quantized_decoder(model: LightCap, prepared: GraphModule, floating: Collection[str] = ()) -> tuple[ModelProto, ModelProto]:
    """Prefix and step. `prepared`: what `calibrated` gives; `floating`: parts (`simulate.parts`) that keep their float weights. StageError
    where a weight got no scales."""
    found = observe.linear_scales(prepared)
    float_weights = {graph_name(name) for name in found if part_named(name.removesuffix(".weight")) in floating}
    scales = {graph_name(name): scale for name, scale in found.items()}
    for name, parts in stacks(model).items():
        parts = [graph_name(part) for part in parts]
        if float_weights.issuperset(parts):
            float_weights.add(name)
        elif scales.keys() >= set(parts):
            scales[name] = stacked(name, [scales[part] for part in parts])
    prefix, step = prefix_graph(model), step_graph(model)
    for proto in (prefix, step):
        make_integer(proto.graph, scales, float_weights)
    return prefix, step


def stacked(name: str, scales: Sequence[Scales]) -> Scales:
    """Of Linears that read the same, as one that gives what they give one after the other. StageError where what they read has several
    scales."""
    if len({(one.scale, one.zero_point) for one in scales}) > 1:
        raise StageError(f"calibration gave several scales for what {name} reads")
    weight, integers = (np.concatenate([getattr(one, part) for one in scales]) for part in ("weight", "integers"))
    return Scales(scales[0].scale, scales[0].zero_point, weight, integers)


def calibrated(model: LightCap, samples: Iterable[tuple[Tensor, ...]], reduce_range: bool = False) -> GraphModule:
    """The decoder with observers that saw `samples`, each what `teacher_forced` makes of one image (so unpadded)."""
    grid = model.config.grid**2
    inputs = tuple(torch.cat([x, x]) for x in teacher_forced(model, torch.zeros(1, grid, model.config.channels), [[0] * 6, [0] * 8]))
    images, length, prefix = Dim("images", min=1, max=LONGEST), Dim("length", min=2, max=LONGEST), model.config.prefix
    # The mask is (B, 1, P + T, P + T): its sizes follow from the others.
    shapes = {"grid": {0: images}, "tokens": {0: images, 1: length}, "positions": {0: images, 1: length},
              "mask": {0: images, 2: length + prefix, 3: length + prefix}}
    if model.config.concepts:
        shapes["concepts"] = {0: images}
    prepared = observe.prepare(observe.TeacherForced(model), inputs, shapes, reduce_range)
    observe.run(prepared, samples)
    return prepared


def teacher_forced(model: LightCap, grid: Tensor, captions: list[list[int]]) -> tuple[Tensor, ...]:
    """One image's captions, one after the other without their [SEP], and for a model of masked pieces a [MASK] for each place, as its steps
    append them -> grid, tokens (1, T), positions (1, T), mask (1, 1, P + T, P + T) and, where the model reads them, its concepts."""
    batch = pack(Captions.of([captions]), [0]).probing(model.config.mask_piece)
    concepts = model.find_concepts(grid)
    return grid, batch.tokens, batch.positions, batch.mask(model.config.prefix), *(() if concepts is None else (concepts,))


def graph_name(name: str) -> str:
    """A weight's name in LightCap -> its name in `export.decoder.weights`."""
    name = name.removeprefix("model.").removeprefix("fusion.").removeprefix("heads.")
    return "vocabulary" if name == "word.weight" else name


def make_integer(graph: GraphProto, scales: dict[str, Scales], floating: Collection[str] = ()) -> None:
    """Every MatMul against an initializer but those in `floating`, in place. StageError naming the initializers that have no scales."""
    scales = {name: scale for name, scale in scales.items() if name not in floating}
    weights = graphs.initializers(graph)
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    if missing := [name for name in products if name not in scales and name not in floating]:
        raise StageError(f"calibration gave no scales for {', '.join(missing)}")
    nodes: list[NodeProto] = []
    quantized: dict[tuple[str, float, int], tuple[str, str]] = {}
    for node in graph.node:
        name = next((name for name in node.input if name in scales and name in weights), None)
        if name is None:
            nodes.append(node)
        elif node.op_type == "MatMul":
            nodes += integer_product(graph, node, scales[name], quantized)
        elif node.op_type == "Gather" and graphs.attribute(node, "axis", 0) == 1:
            nodes += integer_lookup(node)
        else:
            raise StageError(f"the weight {name} is read by {node.op_type}, which has no integer form here")
    for name in scales.keys() & weights.keys():
        store_integer(graph, weights[name], scales[name])
    graphs.replace_nodes(graph, nodes)
    graphs.prune_unused(graph)


def integer_product(graph: GraphProto, node: NodeProto, scales: Scales, quantized: dict) -> list[NodeProto]:
    """x @ weight as uint8 x int8 -> int32, then scaled. An input that several weights read is quantized once."""
    source, weight = node.input
    out = node.output[0]
    nodes = []
    key = (source, scales.scale, scales.zero_point)
    if key not in quantized:
        point = graphs.add_initializer(graph, f"{out}_point", np.array(scales.zero_point, np.uint8))
        step = graphs.add_initializer(graph, f"{out}_step", np.array(scales.scale, np.float32))
        nodes.append(helper.make_node("QuantizeLinear", [source, step, point], [f"{out}_quantized"]))
        quantized[key] = (f"{out}_quantized", point)
    integers, point = quantized[key]
    factor = graphs.add_initializer(graph, f"{out}_factor", (scales.scale * scales.weight).astype(np.float32))
    return nodes + [
        helper.make_node("MatMulInteger", [integers, weight, point], [f"{out}_sum"]),
        helper.make_node("Cast", [f"{out}_sum"], [f"{out}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}_cast", factor], [out]),
    ]


def integer_lookup(node: NodeProto) -> list[NodeProto]:
    """Columns of the INT8 embedding, each times its word's scale."""
    weight, tokens = node.input
    out = node.output[0]
    return [
        helper.make_node("Gather", [weight, tokens], [f"{out}_column"], axis=1),
        helper.make_node("Cast", [f"{out}_column"], [f"{out}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{weight}_scale", tokens], [f"{out}_scale"], axis=0),
        helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
    ]


def store_integer(graph: GraphProto, tensor: TensorProto, scales: Scales) -> None:
    """Replaces a float weight (in, out) by its INT8 values under the same name, and adds its scale for lookups (removed where unread)."""
    graphs.add_initializer(graph, f"{tensor.name}_scale", scales.weight.astype(np.float32))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(scales.integers.T), tensor.name))
