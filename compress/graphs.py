"""ONNX graphs as data: written without a trace of the machine that made them, and counted tensor by tensor. No torch here."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from compress.runtime import session_options

INTEGER = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT16, TensorProto.UINT16}
SHARED_FROM, ALIGNMENT = 256, 64  # bytes: smaller tensors stay in their graphs; where a shared one begins
PRODUCTS = {"MatMul", "FusedMatMul"}
FLOAT = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}


def clean(model: ModelProto) -> ModelProto:
    """The same graph, in place, its nodes, weights and tensors named in order: its bytes depend on weights and structure alone."""
    model.producer_name = "lightcap"
    graph = model.graph
    names: dict[str, str] = {value.name: value.name for value in [*graph.input, *graph.output]} | {"": ""}
    for index, tensor in enumerate(graph.initializer):
        tensor.name = names.setdefault(tensor.name, f"w{index}")
    for index, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{index}"
        for names_in in (node.input, node.output):
            for place, name in enumerate(names_in):
                names_in[place] = names.setdefault(name, f"t{len(names)}")
    return model


def write(model: ModelProto, path: Path) -> None:
    """Checks the graph and writes it; equal graphs give equal bytes."""
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_sharing(models: Mapping[str, ModelProto], folder: Path, data: str) -> None:
    """Writes the graphs under their names and checks them. Their large weights go to one file `data` beside them, equal ones once; `models`
    keep none of those."""
    places: dict[bytes, int] = {}
    with (folder / data).open("wb") as file:
        for tensor in itertools.chain.from_iterable(model.graph.initializer for model in models.values()):
            array = numpy_helper.to_array(tensor)
            content = array.tobytes()
            if len(content) < SHARED_FROM:
                continue
            if content not in places:
                file.write(bytes(-file.tell() % ALIGNMENT))
                places[content] = file.tell()
                file.write(content)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))  # whichever field held it
            set_external_data(tensor, data, places[content], len(content))
            tensor.ClearField("raw_data")
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(folder / name)


def prune_unused(graph: GraphProto) -> None:
    """Removes nodes and initializers that no output needs, in place."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    replace_nodes(graph, reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def add_initializer(graph: GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def attribute(node: NodeProto, name: str, default=None):
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def kernels(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of `path` on this processor, counted: what really runs, after its fusions. A MatMul by
    a weight counts as the Gemm that it is without a bias, so that MatMuls are an attention's, of two activations."""
    import onnxruntime

    options = session_options(1)
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    weights = initializers(optimized.graph)
    return Counter("Gemm" if node.op_type in PRODUCTS and node.input[1] in weights else node.op_type for node in optimized.graph.node)


def weight_bytes(folder: str | Path) -> dict[str, int]:
    """Bytes of the initializers of every graph in `folder`: {"integer": ..., "float": ...}. Shapes and indices (INT64) count as neither."""
    total = {"integer": 0, "float": 0}
    for _, tensor in named_weights(folder):
        kind = "integer" if tensor.data_type in INTEGER else "float" if tensor.data_type in FLOAT else None
        if kind:
            total[kind] += size_of(tensor)
    return total


def float_weights(models: Mapping[str, ModelProto], at_least: int = 4096) -> list[str]:
    """`graph: tensor (shape)` of each float initializer of `at_least` bytes and two axes or more (biases and scales have one),
    largest first; one that several graphs share once. Of graphs as they were exported: `clean` takes the names away."""
    found: dict[str, tuple[int, str]] = {}
    for graph, model in models.items():
        for tensor in model.graph.initializer:
            if tensor.data_type in FLOAT and len(tensor.dims) > 1 and size_of(tensor) >= at_least:
                found.setdefault(f"{tensor.name} {tuple(tensor.dims)}", (size_of(tensor), graph))
    return [f"{graph}: {name}" for name, (_, graph) in sorted(found.items(), key=lambda item: (-item[1][0], item[0]))]


def named_weights(folder: str | Path) -> list[tuple[str, TensorProto]]:
    """(graph, tensor) of every initializer of the graphs in `folder`, one that several graphs share once."""
    found: dict[tuple, tuple[str, TensorProto]] = {}
    for path in sorted(Path(folder).glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = ExternalDataInfo(tensor) if tensor.external_data else None
            found.setdefault((place.location, place.offset) if place else (path.name, tensor.name), (path.name, tensor))
    return list(found.values())


def size_of(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
