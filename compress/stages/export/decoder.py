"""The decoder as two ONNX graphs, prefix and step: attention spelled out in products, heads folded, the word embedding held once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from compress import graphs
from compress.stages.export.writer import Writer, ints, products
from students.lightcap import LightCap
from students.lightcap.config import PREFIX_POSITION

DECODER_WEIGHTS = "decoder.onnx.data"
ATTENTION, MEMORY = ("query", "key", "value"), ("key", "value")
UNSEEN = -1e9  # added to the score of a piece that is not to be seen


def prefix_graph(model: LightCap) -> ModelProto:
    """grid (N, G, C), and concepts (N, K) word pieces, for a model that reads them -> keys and values layer by layer, each
    (N, heads, K + G, head width): every position of a prefix sees every other. Its weights have the names of `weights`."""
    write, config = Writer(weights(model)), model.config
    inputs = {"grid": (TensorProto.FLOAT, ("n", config.grid**2, config.channels))}
    grid, length = "grid", config.prefix
    if config.concepts:
        inputs["concepts"] = (TensorProto.INT64, ("n", config.concepts))
        words = lookup(write, "concepts", config.concepts)
        if model.modulator is not None:
            gates = write("Sigmoid", write.product(write("Relu", write.product(words, "modulator.down")), "modulator.up"))
            grid = write("Mul", grid, write("ReduceMean", gates, ints(1), keepdims=1))
        shown = write("Concat", words, write.product(grid, "grid"), axis=1)
    else:
        shown = write.product(grid, "grid")
    x, outputs = norm(write, write("Add", shown, "prefix_places"), "norm", model.fusion.norm), {}
    for index, layer in enumerate(model.fusion.layers):
        names = [f"prefix_{part}_{index}" for part in attention_names(model, index)]
        *queries, key, value = by_heads(write, write.product(x, f"layers.{index}.attention"), layer, names, length)
        outputs |= {name: (TensorProto.FLOAT, ("n", heads_of(layer), length, layer.head_dim)) for name in (key, value)}
        if queries:
            rows = write("Softmax", scores(write, queries[0], key, layer), axis=-1)
            x = rest(write, x, write("MatMul", rows, value), layer, index, length)
    return write.model(inputs, outputs)


def step_graph(model: LightCap) -> ModelProto:
    """tokens, positions (N, T): a token, and for a model of masked pieces [MASK] behind it, which it does not see; keys and values of the
    prefix, and of the caption so far, layer by layer, each (N, heads, length, width) -> logits (N, 1, V) of the last, then the keys and
    values of past and of what was read here. Its weights have the names of `weights`."""
    write, count = Writer(weights(model)), 1 if model.config.mask_piece is None else 2
    layers = list(model.fusion.layers)
    inputs = {name: (TensorProto.INT64, ("n", count)) for name in ("tokens", "positions")}
    for kind in ("prefix", "past"):
        inputs |= {f"{kind}_{part}_{index}": (TensorProto.FLOAT, ("n", heads_of(layer), f"{kind}_length", layer.head_dim))
                   for index, layer in enumerate(layers) for part in MEMORY}
    outputs = {"logits": (TensorProto.FLOAT, ("n", 1, model.config.vocabulary))}
    x = write("Add", lookup(write, "tokens", count), write("Gather", "places", "positions", axis=0))
    x, lengths, unseen = norm(write, x, "norm", model.fusion.norm), "", ""
    for index, layer in enumerate(layers):
        names = [f"new_{part}_{index}" for part in attention_names(model, index)]
        *queries, key, value = by_heads(write, write.product(x, f"layers.{index}.attention"), layer, names, count)
        if not queries:
            queries = by_heads(write, write.product(x, f"layers.{index}.query"), layer, [f"new_query_{index}"], count)
        keys, values = (write("Concat", f"past_{part}_{index}", new, out=f"present_{part}_{index}", axis=2)
                        for part, new in zip(MEMORY, (key, value), strict=True))
        outputs |= {name: (TensorProto.FLOAT, ("n", heads_of(layer), f"past_length + {count}", layer.head_dim)) for name in (keys, values)}
        if not lengths:  # the same in all layers
            lengths = write("Concat", *(write("Shape", name, start=2, end=3) for name in (f"prefix_key_{index}", keys)), axis=0)
            unseen = later(write, count, keys) if count > 1 else ""
        before, own = (scores(write, queries[0], known, layer) for known in (f"prefix_key_{index}", keys))
        seen = write("Concat", before, write("Add", own, unseen) if unseen else own, axis=3)
        rows = [f"rows_prefix_{index}", f"rows_own_{index}"]
        write("Split", write("Softmax", seen, axis=-1), lengths, out=rows, axis=3)
        mixed = write("Add", write("MatMul", rows[0], f"prefix_value_{index}"), write("MatMul", rows[1], values))
        x = rest(write, x, mixed, layer, index, count)
    x = x if count == 1 else write("Gather", x, ints(count - 1), axis=1)
    write("Add", write("MatMul", branches(write, x, model), "vocabulary"), "bias", out="logits")
    return write.model(inputs, outputs)


def by_heads(write: Writer, x: str, layer: nn.Module, names: list[str], length: int) -> list[str]:
    """(N, length, parts x heads x width) -> a part for each of `names`, (N, heads, length, width). Of one position nothing is moved."""
    rows = len(names) * heads_of(layer)
    whole = "" if len(names) > 1 else names[0]
    if length == 1:
        x = write("Reshape", x, ints(-1, rows, 1, layer.head_dim), out=whole)
    else:
        x = write("Transpose", write("Reshape", x, ints(-1, length, rows, layer.head_dim)), out=whole, perm=[0, 2, 1, 3])
    if not whole:
        write("Split", x, out=names, axis=1, num_outputs=len(names))
    return names


def scores(write: Writer, query: str, key: str, layer: nn.Module) -> str:
    """Queries (N, heads, T, width) and keys (N, heads, S, width) -> (N, heads, T, S)."""
    matched = write("MatMul", query, write("Transpose", key, perm=[0, 1, 3, 2]))
    return write("Mul", matched, np.array(layer.head_dim**-0.5, np.float32))


def rest(write: Writer, x: str, mixed: str, layer: nn.Module, index: int, length: int) -> str:
    """What follows attention in a layer: x (N, length, hidden), and what was mixed (N, heads, length, width) -> (N, length, hidden)."""
    place = f"layers.{index}"
    if length > 1:
        mixed = write("Transpose", mixed, perm=[0, 2, 1, 3])
    # -1, where 0 would say the same: of sizes that it can infer ONNX Runtime makes SkipLayerNormalization, slower over a prefix.
    mixed = write("Reshape", mixed, ints(-1, length, heads_of(layer) * layer.head_dim))
    x = norm(write, write("Add", x, write.product(mixed, f"{place}.output")), f"{place}.norm1", layer.norm1)
    inner = write("Gelu", write.product(x, f"{place}.up"))
    return norm(write, write("Add", x, write.product(inner, f"{place}.down")), f"{place}.norm2", layer.norm2)


def branches(write: Writer, x: str, model: LightCap) -> str:
    """x (N, 1, hidden) -> the mean of all heads' states, (N, 1, hidden). Their transforms are one product; a norm's scale and shift are
    taken behind it, head by head."""
    count, width = write.weights["branches.scale"].shape
    states = write("Reshape", write("Gelu", write.product(x, "branches.transform")), ints(-1, 1, count, width))
    eps = model.heads.branches[0].norm.eps
    states = write("LayerNormalization", states, np.ones(width, np.float32), axis=-1, epsilon=eps)
    return write("Add", write("ReduceSum", write("Mul", states, "branches.scale"), ints(2), keepdims=0), "branches.shift")


def later(write: Writer, count: int, present: str) -> str:
    """(count, past + count): UNSEEN where a token would see a later one, else 0."""
    shape = write("Concat", ints(count), write("Shape", present, start=2, end=3), axis=0)
    hidden = np.triu(np.full((count, count), UNSEEN, np.float32), 1)
    past = write("Sub", shape, ints(0, count))
    nothing = write("ConstantOfShape", past, value=numpy_helper.from_array(np.zeros(1, np.float32)))
    return write("Concat", nothing, hidden, axis=1)


def norm(write: Writer, x: str, name: str, module: nn.LayerNorm) -> str:
    return write("LayerNormalization", x, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=module.eps)


def lookup(write: Writer, tokens: str, count: int) -> str:
    """tokens (N, count) -> (N, count, hidden)."""
    columns = write("Gather", "vocabulary", write("Reshape", tokens, ints(-1)), axis=1)
    return write("Reshape", write("Transpose", columns, perm=[1, 0]), ints(-1, count, len(write.weights["vocabulary"])))


def weights(model: LightCap) -> dict[str, Tensor]:
    """What both graphs read, by name. The word embedding is held once, as (hidden, V): looked up by column, and multiplied by as it stands
    for the logits."""
    fusion, heads = model.fusion, list(model.heads.branches)
    position, segment = fusion.position.weight, fusion.segment.weight
    found = {"vocabulary": model.word.T, "bias": model.heads.bias, "places": position[:PREFIX_POSITION] + segment[0],
             "prefix_places": position[PREFIX_POSITION : PREFIX_POSITION + model.config.prefix] + segment[1],
             "branches.scale": torch.stack([head.norm.weight for head in heads]) / len(heads),
             "branches.shift": torch.stack([head.norm.bias for head in heads]).mean(0)}
    linears = {"grid": [fusion.grid], "branches.transform": [head.transform for head in heads]}
    norms = {"norm": fusion.norm}
    if model.modulator is not None:
        linears |= {"modulator.down": [model.modulator.down], "modulator.up": [model.modulator.up]}
    for index, layer in enumerate(fusion.layers):
        place = f"layers.{index}"
        linears[f"{place}.attention"] = [getattr(layer, name) for name in attention_names(model, index)]
        linears |= {f"{place}.{name}": [getattr(layer, name)] for name in ("query", "output", "up", "down")}
        norms |= {f"{place}.{name}": getattr(layer, name) for name in ("norm1", "norm2")}
    for name, several in linears.items():
        found |= products(name, *several)
    for name, module in norms.items():
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return found


def stacks(model: LightCap) -> dict[str, list[str]]:
    """Each weight here that is several of `model`'s, one after the other -> their names there."""
    found = {}
    for index in range(len(model.fusion.layers)):
        found[f"layers.{index}.attention.weight"] = [f"fusion.layers.{index}.{name}.weight" for name in attention_names(model, index)]
    found["branches.transform.weight"] = [f"heads.branches.{index}.transform.weight" for index in range(len(model.heads.branches))]
    return found


def attention_names(model: LightCap, index: int) -> Sequence[str]:
    """What one product makes. In the last layer nobody asks for the prefix's states: there queries are a product of their own."""
    return MEMORY if index + 1 == len(model.fusion.layers) else ATTENTION


def heads_of(layer: nn.Module) -> int:
    """Attention heads, of a pruned layer those that are left."""
    return layer.query.out_features // layer.head_dim


def write_decoder(prefix: ModelProto, step: ModelProto, folder: Path) -> None:
    """Both graphs and the file of their weights."""
    graphs.write_sharing({"prefix.onnx": graphs.clean(prefix), "decoder.onnx": graphs.clean(step)}, folder, DECODER_WEIGHTS)
