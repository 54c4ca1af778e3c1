"""The quantized model in PyTorch: calibrated observers become roundings, which can be switched on and off part by part.

With all of them on, its grids and logits are near those of the integer graphs; with those of one part on, they say what that part costs
(`sensitivity`); and gradients pass through them as if nothing were rounded, so that weights can be tuned (`tune`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.stages.quantize.observe import ARITHMETIC, aten, is_observer, rounding_of

ATTENTION = {"query", "key", "value", "output"}
FEED_FORWARD = {"up", "down"}


class ActivationRounding(nn.Module):
    """Quantizes to uint8 with one calibrated scale, and back."""

    def __init__(self, observer: nn.Module) -> None:
        super().__init__()
        (self.scale, self.zero_point), self.on = rounding_of(observer), True

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255) if self.on else x


class WeightRounding(nn.Module):
    """Quantizes to int8 with one scale per output channel, the first axis, by the weight as it is now; and back. `offset` (of `gptq`) is
    added first, so that rounding to nearest gives GPTQ's integer."""

    def __init__(self, observer: nn.Module) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.on = observer.quant_min, observer.quant_max, True
        self.register_buffer("eps", observer.eps.clone())
        self.register_buffer("offset", getattr(observer, "offset", torch.zeros(())))

    def scale(self, x: Tensor) -> Tensor:
        return (x.detach().flatten(1).abs().amax(1) / ((self.quant_max - self.quant_min) / 2)).clamp_min(self.eps)

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        scale, zero_point = self.scale(x), torch.zeros(len(x), dtype=torch.int32, device=x.device)
        return torch.fake_quantize_per_channel_affine(x + self.offset, scale, zero_point, 0, self.quant_min, self.quant_max)


def simulated(prepared: GraphModule) -> GraphModule:
    """A copy of a calibrated graph that rounds where it was observed. An embedding that is a product's weight too is rounded for both."""
    graph = copy.deepcopy(prepared)
    for node in list(graph.graph.nodes):
        if not is_observer(node):
            continue
        observer, source = graph.get_submodule(node.target), node.args[0]
        weight = observer.dtype == torch.int8
        graph.set_submodule(node.target, WeightRounding(observer) if weight else ActivationRounding(observer))
        if weight:
            source.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)
    graph.recompile()
    return graph


def parts(prepared: GraphModule) -> dict[str, list[str]]:
    """Each part that can stay in float -> the observers (or roundings) of its weights and of what it reads, in the order it runs. What two
    parts read is the first one's; what only reshaping reads is its maker's."""
    found: dict[str, list[str]] = {part: [] for part in map(part_of, prepared.graph.nodes) if part is not None}
    for node in prepared.graph.nodes:
        if is_observer(node):
            reading = [part for part in map(part_of, node.users) if part is not None]
            part = reading[0] if reading else maker(node)
            if part is not None:
                found[part].append(str(node.target))
    return {part: names for part, names in found.items() if names}


def maker(node: Node) -> str | None:
    """The part whose result `node` passes on."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if (part := part_of(node)) is not None:
            return part
    return None


def part_of(node: Node) -> str | None:
    """The part that a product, sum or pooling belongs to; None for other nodes."""
    if node.op != "call_function" or node.target not in ARITHMETIC | {aten.linear.default}:
        return None
    if node.target in (aten.linear.default, aten.conv2d.default):
        weight = node.args[1]
        name = str((weight.args[0] if is_observer(weight) else weight).target).removesuffix(".weight")
    else:
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        name = str(list(stack.values())[-1][0])
    return part_named(name)


def part_named(module: str) -> str:
    """A module's path -> its part: a block of the encoder, attention or feed-forward of a layer, the heads, the vocabulary."""
    names = [name for name in module.split(".") if name not in ("model", "trunk")]
    number = next((index for index, name in enumerate(names) if name.isdigit()), None)
    if names[:1] == ["heads"]:
        return "heads"
    if names[-1:] == ["word"]:
        return "vocabulary"
    if number is None:
        return ".".join(names)
    kind = "attention" if names[-1] in ATTENTION else "ffn" if names[-1] in FEED_FORWARD else None
    return ".".join([*names[: number + 1], *([kind] if kind else [])])


def switch(graphs: Collection[GraphModule], on: Collection[str] | None) -> None:
    """Rounds in the parts `on` alone; None: in all."""
    for graph in graphs:
        chosen = {name for part, names in parts(graph).items() if on is None or part in on for name in names}
        for name, module in graph.named_modules():
            if isinstance(module, ActivationRounding | WeightRounding):
                module.on = on is None or name in chosen


def leave_float(prepared: GraphModule, floating: Collection[str]) -> GraphModule:
    """A copy of a calibrated graph in which the parts `floating` read weights and inputs unobserved, so that they stay in float."""
    graph = copy.deepcopy(prepared)
    for node in filter(is_observer, list(graph.graph.nodes)):
        reading = [part_of(user) for user in node.users]
        for user, part in zip(list(node.users), reading, strict=True):
            if (part if any(reading) else maker(node)) in floating:
                user.replace_input_with(node, node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
