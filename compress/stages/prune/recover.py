"""What is left of a captioner learns from the whole one. The encoder, to give its grid again: feature distillation on training pictures,
against the stored grids of them, or against the parent's encoder beside it where pictures are disturbed anew in each step. Then, on the
pruned encoder's features, the concept extractor, to give each concept the odds that the parent's gives it; and the fusion, to say what the
parent says."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.config import Prune
from compress.context import Context
from compress.training.batches import image_batches, steps_of
from compress.training.corpus import UNSEEN_BIAS, corpus, disturbed
from compress.training.distillation import Goal, distil
from compress.training.features import device, grids, normalised, pixels, variance
from compress.training.lessons import from_targets, teach
from compress.training.loop import Group, fit
from compress.training.mentions import concept_loss
from compress.training.start import read_captioner
from students.lightcap import LightCap
from students.lightcap.norms import folded
from teachers.teacher import load


def recover_encoder(model: LightCap, parent: Artifact, settings: dict, config: Prune, seed: int, label: str, context: Context) -> None:
    """Minimises the mean squared error of the grid, over its variance, against the parent's."""
    if config.recover_encoder_epochs == 0:
        return
    data = context.data.split("train")
    own, _, _ = read_captioner(parent.path)
    wanted = grids(own, data, settings, context.cache, context.progress)
    pictures = pixels(data, settings, context.cache, context.progress)
    scale = variance(wanted)
    where = device()
    own.encoder.to(where, memory_format=torch.channels_last).eval()
    model.to(where)
    # Norms keep their statistics, as in the training of a pretrained encoder: by those of a batch of a few pictures, the unpruned encoder's
    # own grid would be far from the one that is asked for.
    model.encoder.to(memory_format=torch.channels_last).eval().requires_grad_(True)
    rows_of = image_batches(len(data), config.batch_images, seed)
    steps = steps_of(len(data), config.recover_encoder_epochs, config.batch_images)

    def loss_of(step: int) -> Tensor:
        rows = rows_of(step)
        seen = disturbed(normalised(pictures[rows], settings, where), config.flip, config.crop)
        grid = model.encode(seen)
        if config.flip or config.crop:
            with torch.no_grad():
                goal = own.encode(seen)
        else:
            goal = torch.from_numpy(wanted[rows]).to(where)
        return (grid.float() - goal.float()).square().mean() / scale

    groups = [Group(list(model.encoder.parameters()), config.encoder_learning_rate)]
    with folded(model.encoder, model.config.image_size), folded(own.encoder, own.config.image_size):
        fit(nn.ModuleDict({"encoder": model.encoder}), groups, steps, loss_of, config, seed, context.work, label, context.progress)
    model.cpu().eval()
    model.contiguous_()


def recover_concepts(model: LightCap, parent: Artifact, settings: dict, config: Prune, seed: int, label: str, context: Context) -> None:
    """Minimises the binary cross-entropy of each concept's odds against the parent's, each by the grid of its own encoder. The odds choose
    what the fusion is told of a picture, and no derivative of its own loss would come back through that choice. In fp32, as they choose:
    where odds differ by less than bf16 resolves, recovery by it stays behind."""
    if config.recover_concepts_epochs == 0:
        return
    data = context.data.split("train")
    own, _, _ = read_captioner(parent.path)
    known, seen = (grids(one, data, settings, context.cache, context.progress) for one in (own, model))
    where = device()
    own.to(where)
    model.to(where)
    rows_of = image_batches(len(data), config.batch_images, seed)
    steps = steps_of(len(data), config.recover_concepts_epochs, config.batch_images)

    def loss_of(step: int) -> Tensor:
        rows = rows_of(step)
        whole, mine = (torch.from_numpy(features[rows]).to(where).float() for features in (known, seen))
        with torch.no_grad():
            goal = own.concept_scores(whole).sigmoid()
        return concept_loss(model.concept_scores(mine), goal)

    groups = [Group(list(model.alignment.parameters()), config.concepts_learning_rate)]
    config = dataclasses.replace(config, precision="fp32")
    fit(nn.ModuleDict({"alignment": model.alignment}), groups, steps, loss_of, config, seed, context.work, label, context.progress)
    model.cpu()


def recover_fusion(
    model: LightCap, parent: Artifact, tokenizer: Tokenizer, settings: dict, taught: list[tuple[np.ndarray, np.ndarray]] | None,
    config: Prune, seed: int, label: str, context: Context,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distils `model` from its parent, and returns what the parent says of the training captions: `taught`, where it was asked before."""
    data = corpus(model, tokenizer, settings, context)
    if taught is None:
        teacher = load(parent.path)
        teacher.narrow(data.keep)
        own, _, _ = read_captioner(parent.path)
        seen = corpus(own, tokenizer, settings, context)
        taught = teach([teacher], [parent], seen, config.top_k, config.temperature, config.precision, [context.stage.parent], context)
    full = model.word.detach().clone()
    model.narrow(data.keep)
    goal = Goal(("tokens",), temperature=config.temperature, token_weight=config.token_weight)
    steps = data.steps(config.recover_epochs, config.batch_images)
    distil(model, data, from_targets(model, data, taught), goal, config, steps, seed, label, context)
    model.widen(data.keep, full, UNSEEN_BIAS)
    return taught
