"""The quantized model in PyTorch, computed as ONNX Runtime computes it: exact sums of integers, then one float32 factor.

`simulate` adds rounded floats instead: its sums differ in their last bits, and a convolution's bias is not yet an int32. Some activations
of a picture are then rounded to the other side, and fifty layers multiply that. It is near enough to measure and to tune with; whether the
runtime computes what was calibrated is asked of the same arithmetic (benchmarks/equality.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from operator import attrgetter

import mlas
import torch
from mlas import fused
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.decode import Special
from compress.stages.quantize.observe import ACTIVATIONS, aten
from compress.stages.quantize.simulate import ActivationRounding, WeightRounding
from students.lightcap import LightCap

EXACT = 2**24  # float32 holds all integers up to it
RELU = {aten.relu.default, aten.relu_.default}
SUMS = {aten.add.Tensor, aten.add_.Tensor}
FLOAT = {aten.layer_norm.default: mlas.layer_norm, aten.gelu.default: mlas.gelu, aten.sigmoid.default: mlas.sigmoid}
PRODUCTS = {aten.conv2d.default, aten.avg_pool2d.default, aten.linear.default}


class Rounding(nn.Module):
    """QuantizeLinear and DequantizeLinear: uint8, half to even. `limits`: of the activation before it."""

    def __init__(self, of: ActivationRounding, limits: tuple[float, float] = (-math.inf, math.inf)) -> None:
        super().__init__()
        self.scale, self.zero_point, self.limits = of.scale, of.zero_point, tuple(limit / of.scale for limit in limits)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_steps(x / self.scale)

    def of_steps(self, steps: Tensor) -> Tensor:
        """`steps`: numbers divided by the scale."""
        return steps.clamp(*self.limits).round().clamp(-self.zero_point, 255 - self.zero_point) * self.scale


class Product(nn.Module):
    """A convolution (QLinearConv), which ends in `rounding`, or a Linear (MatMulInteger, Cast, Mul, Add) without one, of what `source`
    rounded. `weight` (out, ...): integers times `scales` (out); `rest`: what `function` takes behind the bias."""

    def __init__(self, function, source: ActivationRounding | Rounding, weight: Tensor, scales: Tensor, bias: Tensor,
                 rounding: Rounding | None, rest: Sequence = ()) -> None:
        super().__init__()
        self.function, self.scale, self.rounding, self.rest = function, source.scale, rounding, rest
        integers = (weight / column(scales, weight)).round()
        largest = integers.flatten(1).abs().sum(1).max() * max(source.zero_point, 255 - source.zero_point)
        self.register_buffer("weight", integers if largest < EXACT else integers.double())
        factor = source.scale * scales
        self.register_buffer("bias", bias if rounding is None else (bias / factor).round().double())
        self.register_buffer("factor", factor if rounding is None else factor / rounding.scale)

    def forward(self, x: Tensor) -> Tensor:
        total = self.function((x / self.scale).round().to(self.weight.dtype), self.weight, None, *self.rest)
        if self.rounding is None:
            return total.float() * self.factor + self.bias
        bias, factor = column(self.bias, total[0]), column(self.factor, total[0])
        return self.rounding.of_steps((total + bias).float() * factor)


class Sum(nn.Module):
    """QLinearAdd of what `left` and `right` rounded. Halves are frequent here, so that the order of its float32 operations counts: the zero
    points first, then `right` and `left`."""

    def __init__(self, left: ActivationRounding | Rounding, right: ActivationRounding | Rounding, rounding: Rounding) -> None:
        super().__init__()
        self.sources, self.rounding = (right, left), rounding
        self.ratios = [torch.tensor(source.scale) / torch.tensor(rounding.scale) for source in self.sources]
        points = 0.0
        for source, ratio in zip(self.sources, self.ratios, strict=True):
            points = fused(source.zero_point, ratio, points)
        self.start = rounding.zero_point - points

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total = self.start
        for x, source, ratio in zip((right, left), self.sources, self.ratios, strict=True):
            total = fused((x / source.scale).round() + source.zero_point, ratio, total)
        return self.rounding.of_steps(total.round() - self.rounding.zero_point)


def column(values: Tensor, like: Tensor) -> Tensor:
    """`values` (n) for the first axis of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def integer(simulated: GraphModule, prefix: int = 0) -> GraphModule:
    """A copy of what `simulate.simulated` gives, computed in integers: every Linear of rounded inputs, and every convolution, average pool
    and sum of two whose result is rounded too. Norms, GELU, sigmoid and attention are those of `mlas`; means and the concepts'
    exponentials are PyTorch's. `prefix`: how many places a caption's pieces see before it."""
    graph = copy.deepcopy(simulated)
    for number, node in enumerate(list(graph.graph.nodes)):
        if node.target is aten.scaled_dot_product_attention.default:
            node.target, node.args = mlas.attention, (*node.args, prefix)
        elif node.target in FLOAT:
            node.target = FLOAT[node.target]
        if node.target not in SUMS | PRODUCTS:
            continue
        chain = [node] if node.target is aten.linear.default else rounded(graph, node)
        module, inputs = in_integers(graph, node, chain)
        if module is not None:
            graph.add_submodule(f"integer_{number}", module)
            with graph.graph.inserting_before(chain[-1]):
                chain[-1].replace_all_uses_with(graph.graph.call_module(f"integer_{number}", inputs))
            for old in reversed(chain):
                graph.graph.erase_node(old)
    graph.graph.eliminate_dead_code()
    for name, module in list(graph.named_modules()):
        if isinstance(module, ActivationRounding):
            graph.set_submodule(name, Rounding(module))
    graph.recompile()
    return graph


def rounded(graph: GraphModule, node: Node) -> list[Node]:
    """`node`, the activation that alone reads it, if any, and the rounding that alone reads that; `node` alone where there is none."""
    chain = [node]
    while len(chain) < 3 and len(chain[-1].users) == 1:
        chain.append(next(iter(chain[-1].users)))
        if isinstance(module_of(graph, chain[-1]), ActivationRounding):
            return chain
        if chain[-1].target not in ACTIVATIONS:
            break
    return chain[:1]


def in_integers(graph: GraphModule, node: Node, chain: list[Node]) -> tuple[nn.Module | None, tuple[Node, ...]]:
    """What computes `chain`, which begins at the product or sum `node`, and its inputs; None where a neighbour is not rounded."""
    target = node.target
    if len(chain) == 1 and target is not aten.linear.default:
        return None, ()
    inputs = tuple(unpadded(graph, source) for source in node.args[: 2 if target in SUMS else 1] if isinstance(source, Node))
    sources = [rounding_of(graph, source) for source in inputs]
    if None in sources or len(sources) != (2 if target in SUMS else 1):
        return None, ()
    rounding = Rounding(module_of(graph, chain[-1]), limits(chain[1:-1])) if len(chain) > 1 else None
    if target in SUMS:
        return Sum(*sources, rounding), inputs
    if target is aten.avg_pool2d.default:
        return pool(node, sources[0], rounding), inputs
    rule = module_of(graph, node.args[1])
    if not isinstance(rule, WeightRounding):
        return None, ()
    weight = value(graph, node.args[1].args[0])
    bias = torch.zeros(len(weight)) if len(node.args) < 3 or node.args[2] is None else value(graph, node.args[2])
    return Product(target, sources[0], rule(weight), rule.scale(weight), bias, rounding, node.args[3:]), inputs


def pool(node: Node, source: ActivationRounding | Rounding, rounding: Rounding) -> Product | None:
    """An average pool as `encoder.integer_pool` writes it, a depthwise convolution with ones; None where it pads, or does more."""
    if len(node.args) != 3 or len(set(node.args[1])) > 1:
        return None
    count, side = node.meta["val"].shape[1], node.args[1][0]
    weight, scales = torch.full((count, 1, side, side), 1 / side**2), torch.full((count,), 1 / side**2)
    return Product(aten.conv2d.default, source, weight, scales, torch.zeros(count), rounding, (node.args[2], [0, 0], [1, 1], count))


def unpadded(graph: GraphModule, rounding: Node) -> Node:
    """What a product reads: not the rounding of zeros around what is rounded, which `encoder.observed` leaves out."""
    below = rounding.args[0] if isinstance(module_of(graph, rounding), ActivationRounding) else rounding
    return below if pads_zeros(below) and rounding_of(graph, below) is not None else rounding


def pads_zeros(node: Node) -> bool:
    return node.target is aten.pad.default and node.args[2:3] in ((), ("constant",)) and not any(node.args[3:])


def rounding_of(graph: GraphModule, node: Node) -> ActivationRounding | Rounding | None:
    """How the numbers that `node` gives were rounded, before a Pad or not; None where they were not."""
    module = module_of(graph, node.args[0] if pads_zeros(node) else node)
    return module if isinstance(module, ActivationRounding) else module.rounding if isinstance(module, Product | Sum) else None


def limits(activations: Sequence[Node]) -> tuple[float, float]:
    """The least and greatest value that an activation, if there is one, lets pass."""
    if not activations:
        return -math.inf, math.inf
    (node,) = activations
    if node.target in RELU:
        return 0.0, math.inf
    low, high = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
    return float(low), float(high)


def module_of(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def value(graph: GraphModule, node: Node) -> Tensor:
    return attrgetter(str(node.target))(graph).detach()


@torch.no_grad()
def greedy(
    decoder: GraphModule, model: LightCap, grid: Tensor, special: Special, concepts: GraphModule | None = None
) -> tuple[list[list[int]], Tensor]:
    """The pieces of the most probable captions of `grid` (B, G, C) by a simulated decoder, which is asked anew for each piece, and the
    logits (B, T, V) that chose them, as far as the longest of them goes. `concepts`: the simulated scores of concepts, where the model
    reads some. `model` says the sizes, how concepts are spelled, and whether the piece under a [MASK] behind the caption is predicted."""
    count, most, prefix, masked = len(grid), model.config.max_tokens, model.config.prefix, model.config.mask_piece
    tokens = torch.full((count, most), special.start)
    width = most + 1
    mask = torch.ones(prefix + width, prefix + width, dtype=torch.bool).tril()
    mask[:, :prefix] = True
    positions, mask = torch.arange(width).expand(count, width), mask.expand(count, 1, -1, -1)
    found = () if concepts is None else (model.concepts.choose(concepts(grid), model.config.concepts),)
    chosen = []
    ended = torch.zeros(count, dtype=torch.bool)
    for place in range(most):
        if masked is None:
            asked, read = place, tokens[:, : max(place + 1, 2)]  # the graph takes no single token
        else:
            asked, read = place + 1, torch.cat([tokens[:, : place + 1], torch.full((count, 1), masked)], 1)
        length = read.shape[1]
        seen = mask[..., : prefix + length, : prefix + length]
        logits = decoder(grid, read, positions[:, :length], seen, *found)[:, asked].clone()
        logits[:, list(special.never)] = -torch.inf
        chosen.append(logits)
        ended |= logits.argmax(-1) == special.end
        if ended.all():
            break
        if place + 1 < most:
            tokens[:, place + 1] = logits.argmax(-1)
    pieces = torch.stack([logits.argmax(-1) for logits in chosen], 1).tolist()
    return [row[: row.index(special.end)] if special.end in row else row for row in pieces], torch.stack(chosen, 1)
