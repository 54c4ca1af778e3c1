"""What is set anew by a few pictures, without training, where channels left: the statistics of the encoder's norms, and the second layer of
the concept extractor.

Where channels left, what they gave on average is missing from every sum that they were part of: activations behind it are shifted,
rectifiers close, and through closed ones nothing is learned. So each norm's mean and variance are set so that over training pictures it
gives each channel that stayed the mean and the spread of before (Jordan et al., ICLR 2023, do so for averaged networks).

What the concept extractor finds is chosen, not computed, so that no derivative would teach it: its second layer gets by least squares the
weights that give what the whole one gave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.context import Context
from compress.stages.prune.channels import Block, remove
from compress.training.features import grids, normalised, pixels
from students.lightcap import LightCap

PICTURES = 128
REGIONS_OF = 512  # pictures whose regions the concept extractor's second layer is refit by
RIDGE = 1e-4  # of the mean square of what the second layer reads
LEAST = 1e-5  # a channel of less spread is constant
MOST = 10.0  # the largest change of a spread, either way


@dataclass(frozen=True)
class Repair:
    """`pictures` (N, 3, H, W) of the training split to run an encoder over, none where none is cut; `grids`, batches of (B, G, channels) of
    training pictures as the parent sees them, none where its concept extractor stays whole."""

    pictures: Tensor | None
    grids: tuple[Tensor, ...]

    @staticmethod
    def of(model: LightCap, settings: dict, parts: Sequence[str], seed: int, context: Context) -> Repair:
        seen, known = None, ()
        if "encoder" in parts:
            seen = pictures(settings, seed, context)
        if "concepts" in parts and model.concepts is not None:
            data = context.data.split("train")
            features = grids(model, data, settings, context.cache, context.progress)
            model.cpu()
            rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:REGIONS_OF])
            known = tuple(torch.from_numpy(features[some]).float() for some in np.array_split(rows, max(1, len(rows) // 50)))
        return Repair(seen, known)

    def carried(self, whole: LightCap) -> LightCap | None:
        return None if self.pictures is None else carrying(whole, self.pictures)

    def without(self, whole: LightCap, chosen: Sequence[Block], carried: LightCap | None) -> LightCap:
        """A copy of `whole` without `chosen`, repaired where that is cut which a repair is for. `carried`: what `whole` carries."""
        cut, kinds = remove(whole, chosen), {block.unit.kind for block in chosen}
        if "conv" in kinds:
            repair(cut, remove(carried, chosen), self.pictures)
        if "concept" in kinds:
            refit_concepts(cut, whole, self.grids)
        return cut


def pictures(settings: dict, seed: int, context: Context) -> Tensor:
    """Some training pictures, (N, 3, H, W), to run an encoder over."""
    data = context.data.split("train")
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:PICTURES])
    return normalised(pixels(data, settings, context.cache, context.progress)[rows], settings, torch.device("cpu"))


def carrying(model: LightCap, batch: Tensor) -> LightCap:
    """A copy of `model` whose norms hold, as weights and biases, the mean and the standard deviation of what each of their channels takes:
    without the same blocks as the model, it holds those of the channels that stay."""
    copied = copy.deepcopy(model)
    found: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}
    with before_norms(copied, lambda norm, x: found.__setitem__(norm, spread(x))):
        copied.encode(batch)
    for norm, (mean, deviation) in found.items():
        norm.weight.data, norm.bias.data = mean, deviation
    return copied


def repair(model: LightCap, carried: LightCap, batch: Tensor) -> None:
    """Changes the statistics of `model`'s norms, one after the other, so that each gives over `batch` what it gave when `carried` was
    taken, but where a channel's spread would change by more than MOST."""
    wanted = dict(zip(norms_of(model), norms_of(carried), strict=True))

    def set_statistics(norm: nn.BatchNorm2d, x: Tensor) -> None:
        (mean, deviation), (mean_before, deviation_before) = spread(x), (wanted[norm].weight, wanted[norm].bias)
        ratio = (deviation.clamp(min=LEAST) / deviation_before.clamp(min=LEAST)).clamp(1 / MOST, MOST)
        norm.running_mean.copy_(mean - (mean_before - norm.running_mean) * ratio)
        norm.running_var.copy_(((norm.running_var + norm.eps) * ratio.square() - norm.eps).clamp(min=0))

    with before_norms(model, set_statistics):
        model.encode(batch)


@torch.no_grad()
def refit_concepts(model: LightCap, whole: LightCap, grids: Sequence[Tensor]) -> None:
    """Changes the second layer of `model`'s concept extractor so that over all regions of `grids`, batches of (B, G, channels), it gives
    what `whole`'s gives, with the least squared error."""
    mine, read, goal = model.alignment, 0.0, 0.0
    for grid in grids:
        seen = mine.inner(grid, model.windows).flatten(0, 1).double()
        seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=seen.dtype)], 1)
        read, goal = read + seen.T @ seen, goal + seen.T @ whole.alignment(grid, whole.windows).flatten(0, 1).double()
    read.diagonal().add_(RIDGE * read.diagonal().mean())
    solved = torch.linalg.solve(read, goal).float()
    mine.second.weight.data, mine.second.bias.data = solved[:-1].T.contiguous(), solved[-1].clone()


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> mean and standard deviation (C,)."""
    deviation, mean = torch.std_mean(x, (0, 2, 3))
    return mean, deviation


def norms_of(model: LightCap) -> list[nn.BatchNorm2d]:
    return [module for module in model.encoder.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def before_norms(model: LightCap, see: Callable[[nn.BatchNorm2d, Tensor], None]) -> Iterator[None]:
    """Inside, `see(norm, input)` before each norm of the encoder, which is in eval mode, without derivatives."""
    model.encoder.eval()
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: see(norm, inputs[0])) for norm in norms_of(model)]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
