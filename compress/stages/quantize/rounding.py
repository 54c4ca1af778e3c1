"""Which way each weight is rounded: the error of one is made good by those of the same output that are not rounded yet.

What a layer reads is correlated, above all the neighbouring pixels of a depthwise convolution, so the errors of an output's weights can
cancel each other; rounding to nearest takes each weight by itself. This is GPTQ (Frantar et al., 2023): Optimal Brain Surgeon (Hassibi and
Stork, 1993), a column at a time. The integers stay integers, so nothing is slower for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from compress.stages.quantize.observe import aten
from compress.stages.quantize.simulate import WeightRounding, simulated

IMAGES = 64  # of the calibration's, whose layer inputs make the Hessians
PLACES = 20_000  # of what a layer reads from all of them together
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
BLOCK = 128  # columns, after which the later ones learn of their errors


@torch.no_grad()
def compensate(prepared: GraphModule, samples: Sequence[tuple[Tensor, ...]], progress) -> None:
    """Gives, in place, the observer of each weight that convolutions or linear layers alone read its `offset`: what rounding together adds
    to the weight, which rounding to nearest then gives.

    `prepared` is a calibrated graph, `samples` are inputs of it. All of them go through it node by node, rounded as far as it goes, so that
    each layer's weights suit what the rounded layers before it say."""
    graph = simulated(prepared)
    nodes = list(graph.graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    todo = {node: weight for node in nodes if (weight := rounded_weight(graph, node)) is not None}
    generator = torch.Generator().manual_seed(0)
    values: dict[Node, list] = {}
    with progress.task("round", len(todo)) as task:
        for node in nodes:
            if not todo:
                break
            if node in todo:
                rounding, weight = node.args[1], todo.pop(node)
                offset = offset_of(graph, node, weight, values[node.args[0]], generator)
                prepared.get_submodule(rounding.target).register_buffer("offset", offset)
                graph.get_submodule(rounding.target).offset = offset
                values[rounding] = [graph.get_submodule(rounding.target)(weight)] * len(samples)
                task.advance(1)
            values[node] = [run_node(graph, node, values, samples, index) for index in range(len(samples))]
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]


def rounded_weight(graph: GraphModule, node: Node) -> Tensor | None:
    """The float weight of a convolution or linear layer whose rounding it alone reads."""
    if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.linear.default):
        return None
    rounding = node.args[1]
    if rounding.op != "call_module" or not isinstance(graph.get_submodule(rounding.target), WeightRounding) or len(rounding.users) > 1:
        return None
    return attrgetter(rounding.args[0].target)(graph)


def run_node(graph: GraphModule, node: Node, values: dict[Node, list], samples: Sequence[tuple[Tensor, ...]], index: int):
    """What `node` gives for the sample `index`."""
    if node.op == "placeholder":
        return samples[index][[item for item in graph.graph.nodes if item.op == "placeholder"].index(node)]
    if node.op == "get_attr":
        return attrgetter(node.target)(graph)
    args, kwargs = (map_arg(given, lambda source: values[source][index]) for given in (node.args, node.kwargs))
    return (graph.get_submodule(node.target) if node.op == "call_module" else node.target)(*args, **kwargs)


def offset_of(graph: GraphModule, node: Node, weight: Tensor, inputs: list[Tensor], generator: torch.Generator) -> Tensor:
    """What rounding together adds to the weight of `node`, which reads `inputs`."""
    rounding = graph.get_submodule(node.args[1].target)
    groups = argument(node, 6, 1) if node.target is aten.conv2d.default else 1
    grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
    hessian = torch.zeros(groups, grouped.shape[2], grouped.shape[2], dtype=torch.float64)
    for given in inputs:
        columns = read_by(node, given, weight.shape, groups)
        some = torch.randperm(columns.shape[2], generator=generator)[: -(-PLACES // len(inputs))]
        hessian += columns[:, :, some] @ columns[:, :, some].transpose(1, 2)
    scale = rounding.scale(weight).reshape(groups, -1)
    together = rounded_together(grouped, hessian, scale, rounding.least, rounding.most)
    return together.reshape(weight.shape).to(weight.dtype) - weight


def argument(node: Node, index: int, default):
    return node.args[index] if len(node.args) > index else default


def read_by(node: Node, x: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """What the rows of a weight of `shape` are multiplied by: (groups, K, places)."""
    if node.target is aten.linear.default:
        return x.flatten(0, -2).T[None]
    stride, padding, dilation = argument(node, 3, [1, 1]), argument(node, 4, [0, 0]), argument(node, 5, [1, 1])
    columns = F.unfold(x, shape[2:], dilation, padding, stride)
    return columns.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)


def rounded_together(weight: Tensor, hessian: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """weight (G, O, K), hessian (G, K, K) = the sum of x x' over what a group reads, scale (G, O) -> integers from `least` to `most` times
    the scale, (G, O, K) float64, near the least of (w - q) H (w - q)'. The columns with the greatest inputs come first."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damped = hessian.double() + torch.diag_embed((DAMPING * diagonal.mean(1, keepdim=True) + 1e-12).expand_as(diagonal))
    order = diagonal.argsort(dim=1, descending=True)
    places = order[:, None].expand_as(weight)
    left, scale = weight.double().gather(2, places), scale.double()
    damped = damped.gather(1, order[:, :, None].expand_as(damped)).gather(2, order[:, None].expand_as(damped))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        errors = left.new_zeros(*left.shape[:2], stop - start)
        for column in range(start, stop):
            rounded[:, :, column] = (left[:, :, column] / scale).round().clamp(least, most) * scale
            error = (left[:, :, column] - rounded[:, :, column]) / upper[:, column, column, None]
            errors[:, :, column - start] = error
            left[:, :, column:stop] -= error[:, :, None] * upper[:, None, column, column:stop]
        left[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(rounded).scatter_(2, places, rounded)
