"""What can be removed: channels of the encoder, attention heads, feed-forward width, the inner width of the concept extractor, and the
width of the hidden states.

Encoder channels are removed by torch-pruning's dependency graph: those inside a block, and those that residual sums couple through a whole
stage, from all of its blocks at once. The grid's own stay.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from students.lightcap import LightCap

LEAST_SHARE = 0.25  # of a unit's whole width that always stays: a layer that is cut off cannot be recovered


@dataclass(frozen=True)
class Unit:
    """A set of `width` interchangeable channels (or heads) under the name of the module that writes them: the first, where a residual sum
    makes one channel of what several convolutions (`writers`) give. `readers`: the modules that mix these channels with each other; a
    depthwise convolution does not."""

    kind: Literal["conv", "ffn", "head", "concept", "hidden"]
    name: str
    width: int
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    whole: int | None = None  # its width before any step of the pruning; None: this one


@dataclass(frozen=True)
class Block:
    """Channels of one unit that leave together; `cost` is their summed importance over what they save."""

    unit: Unit
    channels: tuple[int, ...]
    cost: float


def units(model: LightCap, parts: Sequence[str], before: Sequence[Unit] = ()) -> list[Unit]:
    """Those of `model`; `before`: those that it had before any step."""
    found = []
    if "encoder" in parts:
        graph = dependency_graph(model)
        convolutions = {module: name for name, module in model.encoder.named_modules() if isinstance(module, nn.Conv2d)}
        last = list(convolutions)[-1]
        for group in graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d]):
            writing = {d.target.module for d, _ in group if d.handler == tp.prune_conv_out_channels}
            if writing:
                reading = {d.target.module for d, _ in group if d.handler == tp.prune_conv_in_channels}
                names, readers = (
                    tuple(f"encoder.{name}" for module, name in convolutions.items() if module in some) for some in (writing, reading)
                )
                found.append(Unit("conv", names[0], model.get_submodule(names[0]).out_channels, readers, names))
    if "fusion" in parts:
        for index, layer in enumerate(model.fusion.layers):
            name = f"fusion.layers.{index}"
            found.append(Unit("ffn", name, layer.up.out_features, (f"{name}.down",)))
            found.append(Unit("head", name, layer.query.out_features // layer.head_dim, (f"{name}.output",)))
    if "concepts" in parts and model.concepts is not None:
        found.append(Unit("concept", "alignment", model.alignment.first.out_features, ("alignment.second",)))
    if "hidden" in parts:
        found.append(Unit("hidden", "fusion", model.word.shape[1]))
    whole = {(unit.kind, unit.name): unit.width for unit in before}
    return [dataclasses.replace(unit, whole=whole.get((unit.kind, unit.name))) for unit in found]


def dependency_graph(model: LightCap) -> tp.DependencyGraph:
    size = model.config.image_size
    return tp.DependencyGraph().build_dependency(model.encoder.train(False), torch.zeros(1, 3, size, size))


def blocks(scores: dict[Unit, Tensor], round_to: int, savings: dict[tuple[str, str], float]) -> list[Block]:
    """Every removable block, the one that saves most for its importance first; within a unit the least important channels go first.

    Widths that stay are multiples of `round_to`: odd ones are slower. A block of heads is one head.
    """
    found = []
    for unit, score in scores.items():
        size = 1 if unit.kind == "head" else round_to
        order = score.argsort(stable=True).tolist()
        most = unit.width - max(size, round((unit.whole or unit.width) * LEAST_SHARE))
        saving = savings[unit.kind, unit.name]
        start, first, least = 0, unit.width % size or size, 0.0
        while start + first <= most:
            channels = order[start : start + first]
            # A later block of a unit never ranks before an earlier one: their order within the unit is fixed.
            least = max(least, float(score[channels].mean()) / saving)
            found.append(Block(unit, tuple(channels), least))
            start, first = start + first, size
    return sorted(found, key=lambda block: block.cost)


def remove(model: LightCap, chosen: Sequence[Block]) -> LightCap:
    """A copy of `model` without the channels of `chosen`."""
    model = copy.deepcopy(model)
    gone: dict[Unit, list[int]] = {}
    for block in chosen:
        gone.setdefault(block.unit, []).extend(block.channels)
    graph = dependency_graph(model) if any(unit.kind == "conv" for unit in gone) else None
    for unit, channels in gone.items():
        module = model.get_submodule(unit.name)
        if unit.kind == "conv":
            graph.get_pruning_group(module, tp.prune_conv_out_channels, sorted(channels)).prune()
        elif unit.kind == "hidden":
            narrow_hidden(model, sorted(channels))
        elif unit.kind == "ffn":
            tp.prune_linear_out_channels(module.up, sorted(channels))
            tp.prune_linear_in_channels(module.down, sorted(channels))
        elif unit.kind == "concept":
            tp.prune_linear_out_channels(module.first, sorted(channels))
            tp.prune_linear_in_channels(module.second, sorted(channels))
        else:
            width = module.head_dim
            wide = [head * width + i for head in sorted(channels) for i in range(width)]
            for linear in (module.query, module.key, module.value):
                tp.prune_linear_out_channels(linear, wide)
            tp.prune_linear_in_channels(module.output, wide)
    return model


def narrow_hidden(model: LightCap, gone: list[int]) -> None:
    """Cuts hidden channels out of everything that reads or writes them. Norms are over what stays, so this is no silencing."""
    fusion, layers, branches = model.fusion, list(model.fusion.layers), list(model.heads.branches)
    for embedding in (fusion.word, fusion.position, fusion.segment):
        tp.prune_embedding_out_channels(embedding, gone)
    for norm in hidden_norms(model):
        tp.prune_layernorm_out_channels(norm, gone)
    for linear in (fusion.grid, *(writer for layer in layers for writer in (layer.output, layer.down))):
        tp.prune_linear_out_channels(linear, gone)
    for linear in (reader for layer in layers for reader in (layer.query, layer.key, layer.value, layer.up)):
        tp.prune_linear_in_channels(linear, gone)
    for branch in branches:
        tp.prune_linear_in_channels(branch.transform, gone)
        tp.prune_linear_out_channels(branch.transform, gone)
    if model.modulator is not None:
        tp.prune_linear_in_channels(model.modulator.down, gone)


def hidden_norms(model: LightCap) -> list[nn.LayerNorm]:
    """The norms whose outputs are the hidden states: all that is read of them, and the heads' states."""
    layers = [norm for layer in model.fusion.layers for norm in (layer.norm1, layer.norm2)]
    return [model.fusion.norm, *layers, *(branch.norm for branch in model.heads.branches)]
