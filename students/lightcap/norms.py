"""Batch norms of fixed statistics, folded into the convolutions before them for as long as both are trained.

In eval mode a norm is a scale and a shift of each channel. As an operation of its own it passes over all activations, forward and backward,
for little arithmetic. Folded, conv(x, w) * s + t is conv(x, w * s) + t, the same function of the same parameters; their gradients come
through the few products w * s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def folded(encoder: nn.Module, image_size: int) -> Iterator[None]:
    """Inside, each norm of `encoder` that is in eval mode and takes a convolution's output is part of that convolution, whose output
    nothing else may read. Parameters, their names and the encoder's modules stay as they are."""
    pairs = [(conv, norm) for conv, norm in read_by_norms(encoder, image_size) if not norm.training]
    for conv, norm in pairs:
        conv.forward, norm.forward = partial(convolved_and_normed, conv, norm), nn.Identity().forward
    try:
        yield
    finally:
        for module in (module for pair in pairs for module in pair):
            del module.forward


def convolved_and_normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)


def read_by_norms(encoder: nn.Module, image_size: int) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions whose output the next module that runs, a norm, takes; found by running the encoder once, unchanged."""
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    last: list[tuple[nn.Conv2d, Tensor]] = []

    def after(conv: nn.Conv2d, _inputs, output: Tensor) -> None:
        last[:] = [(conv, output)]

    def before(norm: nn.BatchNorm2d, inputs) -> None:
        if last and last[0][1] is inputs[0]:
            pairs.append((last[0][0], norm))
        last.clear()

    hooks = [module.register_forward_hook(after) for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    hooks += [module.register_forward_pre_hook(before) for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    modes = {module: module.training for module in encoder.modules()}
    weight = next(encoder.parameters())
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, image_size, image_size, device=weight.device))
    for hook in hooks:
        hook.remove()
    for module, mode in modes.items():
        module.training = mode
    return pairs
