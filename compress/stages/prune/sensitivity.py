"""What cutting costs, measured: of half of a unit's channels, and of a whole layer of the fusion.

A gate's derivative says what one channel is worth while all others are there. Many that leave together are worth something else, and by how
much differs from unit to unit: how far the captions' distributions move (KL divergence) without a unit's less important half, over what the
derivatives had said of it, is the unit's factor. With it, importance still ranks the channels within a unit, and what was measured compares
the units. It is measured after repair: most of what a cut costs at first is a shift that repair takes back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.context import Context
from compress.sources import made_by
from compress.stages.prune.channels import Unit, blocks
from compress.stages.prune.importance import IMAGES
from compress.stages.prune.repair import Repair
from compress.training.batches import IGNORED
from compress.training.corpus import corpus
from compress.training.features import device, digest
from compress.training.store import found, stored
from students.lightcap import LightCap

FOLDER = "sensitivity"  # of the cache
LOOKS = 4  # batches at most that a divergence is the mean of
LEAST = 1e-4  # nats a piece: a smaller divergence is not told from none


def measured(
    model: LightCap, tokenizer: Tokenizer, settings: dict, seed: int, context: Context
) -> tuple[LightCap, Callable[[LightCap], float]]:
    """`model` with the word pieces of training captions alone; and how far what is cut from it moves from it: the KL divergence of its
    distributions on training captions, the mean in nats a piece."""
    data = corpus(model, tokenizer, settings, context, tuned=True)
    narrow = copy.deepcopy(model)
    narrow.narrow(data.keep)
    batch_of = data.batches(IMAGES, seed, narrow.config.mask_piece)
    batches = [batch_of(step) for step in range(min(LOOKS, data.steps(1, IMAGES)))]

    @torch.inference_mode()
    def logs(cut: LightCap) -> list[Tensor]:
        cut = copy.deepcopy(cut).to(device()).eval()  # what is cut further stays where it was
        cut.encoder.to(memory_format=torch.channels_last)
        said = []
        for batch in batches:
            states = cut.states(data.grid_of(cut, batch.images), batch.tokens, batch.positions, batch.mask(cut.config.prefix))
            said.append(cut.heads(states[batch.targets != IGNORED], cut.word).log_softmax(-1))
        return said

    whole: list[Tensor] = []

    def moved(cut: LightCap) -> float:
        if not whole:
            whole.extend(logs(narrow))
        pieces = [(before.exp() * (before - after)).sum(-1) for before, after in zip(whole, logs(cut), strict=True)]
        return float(torch.cat(pieces).mean())

    return narrow, moved


def sensitivities(
    narrow: LightCap, moved: Callable[[LightCap], float], scores: Mapping[Unit, Tensor], round_to: int, savings: Mapping, repair: Repair,
    key: Sequence, context: Context,
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Of each unit that can be cut, how far `narrow` moves without the half of its blocks that matters least, by "NAME KIND"; and its
    factor, by kind and name. What is measured is kept in the cache by `key`, which says what `narrow` is, by the data and by what leaves,
    so that another target of the same parent measures nothing anew."""
    halves = {}
    for unit, score in scores.items():
        order = blocks({unit: score}, round_to, savings)
        if order:
            halves[unit] = order[: max(1, len(order) // 2)]
    gone = {unit: sorted(channel for block in half for channel in block.channels) for unit, half in halves.items()}
    halved = [[unit.kind, unit.name, gone[unit]] for unit in halves]
    named = digest(FOLDER, made_by(__name__), key, LOOKS, IMAGES, context.data.split("train").fingerprint, halved)
    moves = found(context.cache / FOLDER, named)
    if moves is None:
        units, carried = list(halves), repair.carried(narrow)

        def move(start: int, stop: int) -> np.ndarray:
            return np.array([moved(repair.without(narrow, halves[unit], carried)) for unit in units[start:stop]])

        with context.progress.task("sensitivity", len(units)) as task:
            moves = stored(context.cache / FOLDER, named, (len(units),), "float64", 1, move, task)
    factors = {}
    for unit, move in zip(gone, moves, strict=True):
        expected = float(scores[unit][gone[unit]].sum())
        factors[unit.kind, unit.name] = max(float(move), LEAST) / max(expected, 1e-12)
    return {f"{unit.name} {unit.kind}": float(move) for unit, move in zip(gone, moves, strict=True)}, factors


def least_layers(narrow: LightCap, moved: Callable[[LightCap], float], count: int) -> list[int]:
    """The `count` layers of the fusion that stay: one by one, the layer leaves without which the model `moved` least."""
    stay = list(range(len(narrow.fusion.layers)))
    while len(stay) > count:
        tried = {gone: moved(with_layers(narrow, [index for index in stay if index != gone])) for gone in stay}
        stay.remove(min(tried, key=tried.get))
    return stay


def with_layers(model: LightCap, stay: list[int]) -> LightCap:
    """A copy of `model` with those layers of its fusion alone."""
    model = copy.deepcopy(model)
    model.fusion.layers = nn.ModuleList(model.fusion.layers[index] for index in stay)
    model.config = dataclasses.replace(model.config, layers=len(stay))
    return model
