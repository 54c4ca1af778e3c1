"""Statistics of a pruned encoder's norms.

Where channels left, what they gave on average is missing from every sum that they were part of: activations behind it are shifted,
rectifiers close, and through closed ones nothing is learned. So each norm's mean and variance are set so that over training pictures it
gives each channel that stayed the mean and the spread of before (Jordan et al., ICLR 2023, do so for averaged networks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from compress.context import Context
from compress.training.features import normalised, pixels
from students.lightcap import LightCap

PICTURES = 128
LEAST = 1e-5  # a channel of less spread is constant
MOST = 10.0  # the largest change of a spread, either way


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
