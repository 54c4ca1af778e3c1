"""SmoothQuant (Xiao et al., 2023): the ranges of what a feed-forward layer reads are evened out, channel by channel, and its weights take
the difference.

INT8 has one scale for all that a product reads and one for each of its outputs. After a LayerNorm or a GELU some channels are ten times
larger than others, and one scale leaves the others few steps; weights have steps to spare. The function of the model stays the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.lightcap import LightCap

SMALLEST = 1e-5  # a channel that calibration never saw move is not stretched without bounds


class Smoothed(nn.Module):
    """A Linear as F.linear(x / factors, weight * factors, bias), `factors` one for each input; `inverse` is 1 / factors."""

    def __init__(self, linear: nn.Linear, factors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach() * factors)
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("inverse", 1 / factors)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.inverse, self.weight, self.bias)


@torch.no_grad()
def smoothed(model: LightCap, samples: Iterable[tuple[Tensor, ...]], alpha: float) -> LightCap:
    """A copy of `model` whose feed-forward layers read smoothed inputs: channel j divided by max |x_j| ^ alpha / max |w_j| ^ (1 - alpha)
    (the paper's equation 4). `samples` are inputs of `LightCap.states`, a grid, tokens, positions, mask and the concepts that are read."""
    changed = copy.deepcopy(model)
    names = [f"layers.{index}.{half}" for index in range(len(changed.fusion.layers)) for half in ("up", "down")]
    products = {name: changed.fusion.get_submodule(name) for name in names}
    greatest: dict[str, Tensor] = {}

    def watch(name: str):
        def look(_module, inputs) -> None:
            found = inputs[0].flatten(0, -2).abs().amax(0)
            greatest[name] = torch.maximum(greatest.get(name, found), found)

        return look

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in products.items()]
    for grid, tokens, positions, mask, *concepts in samples:
        changed.states(grid, tokens, positions, mask, concepts=concepts[0] if concepts else None)
    for hook in hooks:
        hook.remove()
    for name, linear in products.items():
        reads, weights = greatest[name].clamp_min(SMALLEST), linear.weight.abs().amax(0).clamp_min(SMALLEST)
        changed.fusion.set_submodule(name, Smoothed(linear, reads**alpha / weights ** (1 - alpha)))
    return changed
