"""What cutting costs in the caption loss itself, measured: of half of a unit's channels, and of a whole layer of the fusion.

A gate's derivative says what one channel is worth while all others are there. Many that leave together are worth something else, and by how
much differs from unit to unit: the loss's rise without a unit's less important half, over what the derivatives had said of it, is the
unit's factor. With it, importance still ranks the channels within a unit, and what was measured compares the units.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.context import Context
from compress.stages.prune.channels import Unit, blocks, remove
from compress.stages.prune.importance import IMAGES
from compress.training.batches import IGNORED
from compress.training.corpus import corpus
from compress.training.features import device
from students.lightcap import LightCap

LOOKS = 4  # batches at most that a loss is the mean of
LEAST = 1e-3  # nats a token: a smaller rise is not told from none


def measured(
    model: LightCap, tokenizer: Tokenizer, settings: dict, seed: int, context: Context
) -> tuple[LightCap, Callable[[LightCap], float]]:
    """`model` with the word pieces of training captions alone; and the mean caption loss, nats a token, of what is cut from it."""
    data = corpus(model, tokenizer, settings, context, tuned=True)
    narrow = copy.deepcopy(model)
    narrow.narrow(data.keep)
    batch_of = data.batches(IMAGES, seed, narrow.config.mask_piece)
    batches = [batch_of(step) for step in range(min(LOOKS, data.steps(1, IMAGES)))]

    @torch.inference_mode()
    def loss(cut: LightCap) -> float:
        cut = cut.to(device()).eval()
        cut.encoder.to(memory_format=torch.channels_last)
        total = 0.0
        for batch in batches:
            states = cut.states(data.grid_of(cut, batch.images), batch.tokens, batch.positions, batch.mask(cut.config.prefix))
            real = batch.targets != IGNORED
            total += float(F.cross_entropy(cut.heads(states[real], cut.word), batch.targets[real]))
        return total / len(batches)

    return narrow, loss


def sensitivities(
    narrow: LightCap, loss: Callable[[LightCap], float], scores: Mapping[Unit, Tensor], round_to: int, savings: Mapping
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Of each unit that can be cut, the rise of `loss` without the half of its blocks that matters least, by "NAME KIND"; and its factor,
    by kind and name."""
    before, rises, factors = loss(narrow), {}, {}
    for unit, score in scores.items():
        order = blocks({unit: score}, round_to, savings)
        if not order:
            continue
        half = order[: max(1, len(order) // 2)]
        rise = loss(remove(narrow, half)) - before
        rises[f"{unit.name} {unit.kind}"] = rise
        expected = float(sum(score[list(block.channels)].sum() for block in half))
        factors[unit.kind, unit.name] = max(rise, LEAST) / max(expected, 1e-12)
    return rises, factors


def least_layers(narrow: LightCap, loss: Callable[[LightCap], float], count: int) -> list[int]:
    """The `count` layers of the fusion that stay: one by one, the layer leaves without which `loss` is least."""
    stay = list(range(len(narrow.fusion.layers)))
    while len(stay) > count:
        tried = {gone: loss(with_layers(narrow, [index for index in stay if index != gone])) for gone in stay}
        stay.remove(min(tried, key=tried.get))
    return stay


def with_layers(model: LightCap, stay: list[int]) -> LightCap:
    """A copy of `model` with those layers of its fusion alone."""
    model = copy.deepcopy(model)
    model.fusion.layers = nn.ModuleList(model.fusion.layers[index] for index in stay)
    model.config = dataclasses.replace(model.config, layers=len(stay))
    return model
