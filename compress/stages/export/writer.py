"""ONNX graphs written operator by operator, where torch.onnx takes seconds for the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

OPSET, IR = 20, 10  # what ONNX Runtime 1.22 reads


class Writer:
    """Nodes in order, the weights that they read, and constants."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
        self.nodes: list[NodeProto] = []
        self.read: dict[str, np.ndarray] = {}
        self.constants: dict[tuple, str] = {}  # by type, shape and bytes: equal ones are one

    def __call__(self, operator: str, *inputs: str | np.ndarray, out: str | Sequence[str] = "", **attributes) -> str:
        """Adds a node. `inputs`: names of tensors or weights, or constants. Returns the name of its (first) output: `out`, or a new one."""
        outputs = [out or f"t{len(self.nodes)}"] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(operator, [self.name(value) for value in inputs], outputs, **attributes))
        return outputs[0]

    def name(self, value: str | np.ndarray) -> str:
        if isinstance(value, str):
            if value in self.weights:
                self.read[value] = self.weights[value]
            return value
        name = self.constants.setdefault((value.dtype, value.shape, value.tobytes()), f"c{len(self.constants)}")
        self.read[name] = value
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        """Adds a weight, even where an equal one is there already."""
        self.read[name] = value
        return name

    def rename(self, name: str, to: str) -> None:
        """The output `name` of the last node."""
        assert list(self.nodes[-1].output) == [name], name
        self.nodes[-1].output[0] = to

    def product(self, x: str, linear: str) -> str:
        """What `products` are; one that smooths what it reads does so here."""
        if f"{linear}.inverse" in self.weights:
            x = self("Mul", x, f"{linear}.inverse")
        return self("Add", self("MatMul", x, f"{linear}.weight"), f"{linear}.bias")

    def model(self, inputs: Mapping[str, tuple], outputs: Mapping[str, tuple]) -> ModelProto:
        """The graph. `inputs`, `outputs`: {name: (type, sizes)}, a size that may change by its name."""
        ends = [[helper.make_tensor_value_info(name, *like) for name, like in values.items()] for values in (inputs, outputs)]
        tensors = [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in self.read.items()]
        graph = helper.make_graph(self.nodes, "graph", *ends, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def products(name: str, *linears: nn.Module) -> dict[str, Tensor]:
    """Linears that read the same as one that gives what they give one after the other. Its matrix is (in, out), the layout of MatMul and
    MatMulInteger, so that nothing is copied. `inverse` (in,): of one, alone, that smooths what it reads (`quantize.smoothquant`)."""
    found = {f"{name}.weight": torch.cat([one.weight for one in linears]).T, f"{name}.bias": torch.cat([one.bias for one in linears])}
    smoothing = getattr(linears[0], "inverse", None) if len(linears) == 1 else None
    return found if smoothing is None else found | {f"{name}.inverse": smoothing}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)
