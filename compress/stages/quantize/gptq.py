"""GPTQ (Frantar et al., 2023) for static INT8: the columns of a weight are rounded one by one, each one's error corrected in those that are
not rounded yet.

What a layer reads is correlated, above all the neighbouring pixels of a depthwise convolution, so the errors of an output's weights can
cancel each other; rounding to nearest takes each weight by itself. The rule is Optimal Brain Surgeon's (Hassibi and Stork, 1993). The
integers stay integers, so nothing is slower for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from compress.context import Progress
from compress.stages.quantize.observe import aten
from compress.stages.quantize.simulate import WeightRounding, simulated

IMAGES = 64  # of the calibration's, whose layer inputs make the Hessians
PLACES = 20_000  # of what a layer reads from all of them together
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
BLOCK = 128  # columns, after which the later ones are corrected together


@torch.no_grad()
def gptq(prepared: GraphModule, samples: Sequence[tuple[Tensor, ...]], progress: Progress) -> None:
    """Registers, in place, a buffer `offset` on the observer of each weight that one convolution or linear layer alone reads: GPTQ's weight
    less the weight. The word embedding has none: lookup and logits share it.

    `prepared` is a calibrated graph, `samples` are inputs of it, with as many images in each. All of them go through it node by node, so
    that each layer is rounded for what the rounded layers before it say."""
    graph = simulated(prepared)
    nodes = list(graph.graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    todo = [node for node in nodes if has_own_weight(graph, node)]
    given = iter(zip(*samples, strict=True))
    values: dict[Node, list] = {}  # of each sample; weights, and what is made of them alone, are one and the same for all
    varying: set[Node] = set()
    generator = torch.Generator().manual_seed(0)
    with progress.task("gptq", len(todo)) as task:
        for node in nodes:
            if not todo:
                break
            if node is todo[0]:
                rounding, weight = node.args[1], attrgetter(node.args[1].args[0].target)(graph)
                offset = offset_of(graph, node, weight, values[node.args[0]], generator)
                prepared.get_submodule(rounding.target).register_buffer("offset", offset)
                graph.get_submodule(rounding.target).offset = offset
                values[rounding] = [graph.get_submodule(rounding.target)(weight)] * len(samples)
                todo.pop(0)
                task.advance(1)
            ends = [source for source in node.all_input_nodes if last[source] is node]
            if node.op == "placeholder":
                values[node] = list(next(given))
                varying.add(node)
            elif varying.isdisjoint(node.all_input_nodes):
                values[node] = [evaluate(graph, node, values, 0)] * len(samples)
            else:
                varying.add(node)
                values[node] = []
                for index in range(len(samples)):
                    values[node].append(evaluate(graph, node, values, index))
                    for source in varying.intersection(ends):
                        values[source][index] = None
            for source in ends:
                del values[source]


def has_own_weight(graph: GraphModule, node: Node) -> bool:
    """Whether `node` is a convolution or linear layer with a rounded weight that nothing else reads."""
    if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.linear.default):
        return False
    rounding = node.args[1]
    if rounding.op != "call_module" or not isinstance(graph.get_submodule(rounding.target), WeightRounding):
        return False
    weight = rounding.args[0]
    return weight.op == "get_attr" and len(weight.users) == len(rounding.users) == 1


def evaluate(graph: GraphModule, node: Node, values: dict[Node, list], index: int):
    """What `node` gives for the sample `index`."""
    if node.op == "get_attr":
        return attrgetter(node.target)(graph)
    args, kwargs = (map_arg(given, lambda source: values[source][index]) for given in (node.args, node.kwargs))
    return (graph.get_submodule(node.target) if node.op == "call_module" else node.target)(*args, **kwargs)


def offset_of(graph: GraphModule, node: Node, weight: Tensor, inputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """GPTQ's weight less the weight of `node`, which reads `inputs`."""
    rounding = graph.get_submodule(node.args[1].target)
    groups = argument(node, 6, 1) if node.target is aten.conv2d.default else 1
    grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
    hessian = torch.zeros(groups, grouped.shape[2], grouped.shape[2], dtype=torch.float64)
    most = -(-PLACES // sum(len(given) for given in inputs))
    for image in (image for given in inputs for image in given.split(1)):
        columns = read_by(node, image, weight.shape, groups)
        some = columns[:, :, torch.randperm(columns.shape[2], generator=generator)[:most]].double()
        hessian += some @ some.transpose(1, 2)
    scale = rounding.scale(weight).reshape(groups, -1)
    return gptq_rounded(grouped, hessian, scale, rounding.quant_min, rounding.quant_max).reshape(weight.shape).to(weight.dtype) - weight


def argument(node: Node, index: int, default):
    return node.args[index] if len(node.args) > index else default


def read_by(node: Node, x: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """What the rows of a weight of `shape` are multiplied by: (groups, K, places)."""
    if node.target is aten.linear.default:
        return x.flatten(0, -2).T[None]
    stride, padding, dilation = argument(node, 3, [1, 1]), argument(node, 4, [0, 0]), argument(node, 5, [1, 1])
    columns = F.unfold(x, shape[2:], dilation, padding, stride)
    return columns.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)


def gptq_rounded(weight: Tensor, hessian: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """weight (G, O, K), hessian (G, K, K) = the sum of x x' over what a group reads, scale (G, O) -> integers within the bounds times the
    scale, (G, O, K) float64, whose error e has a small e H e'. Columns go by decreasing diagonal (act-order)."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.sort(dim=1, descending=True, stable=True).indices
    places = order[:, None].expand_as(weight)
    left, scale = weight.double().gather(2, places), scale.double()
    damped = hessian.double().gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    damped.diagonal(dim1=1, dim2=2).add_(DAMPING * diagonal.mean(1, keepdim=True) + 1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        errors = left.new_zeros(*left.shape[:2], stop - start)
        for column in range(start, stop):
            rounded[:, :, column] = (left[:, :, column] / scale).round().clamp(quant_min, quant_max) * scale
            error = (left[:, :, column] - rounded[:, :, column]) / upper[:, column, column, None]
            errors[:, :, column - start] = error
            left[:, :, column:stop] -= error[:, :, None] * upper[:, None, column, column:stop]
        left[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(rounded).scatter_(2, places, rounded)
