"""Distillation of a captioner, tokens from cached targets, hidden states and attention from a teacher that runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.config import Optimisation
from compress.context import Context
from compress.training.batches import IGNORED, Batch
from compress.training.corpus import Corpus
from compress.training.features import device
from compress.training.loop import Group, fit, settled
from compress.training.losses import attention_loss, caption_loss, hidden_loss, token_loss
from compress.training.softmax import logits_at
from compress.training.start import language
from compress.training.targets import targets
from students.lightcap import LightCap
from students.lightcap.bert import layer_map
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Goal:
    """What is compared, and its weight. `token_weight` is the share of the teachers' tokens against the captions' own; hidden states and
    attention are added during the first `match_epochs` epochs. `ensemble` is what a head learns tokens from: `each` from its own teacher
    (LightCap), `all` from all of them, `running` from its own and from the mean of the heads before it."""

    match: tuple[str, ...]
    match_epochs: float = 0.0
    temperature: float = 1.0
    token_weight: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    ensemble: str = "each"


def feed_forward(own: int | None, share: float | None, teacher: int) -> int | None:
    """A new student's feed-forward width: its own, if any; `share` of its teacher's, to a multiple of 8; or None, its preset's."""
    return own if own or not share else max(8, round(teacher * share / 8) * 8)


def teach(
    teachers: list[Teacher], sources: list[Artifact], data: Corpus, top_k: int, temperature: float, precision: str, names: Sequence[str],
    context: Context,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each teacher's ids and probabilities over the training captions."""
    chosen = settled(precision, device(), context.work, context.share)
    mark = context.data.split("train").fingerprint
    return [
        targets(teacher, source.digest(), data, mark, top_k, temperature, chosen, context.cache, name, context.progress)
        for teacher, source, name in zip(teachers, sources, names, strict=True)
    ]


def distil(
    model: LightCap, data: Corpus, taught: list[tuple[np.ndarray, np.ndarray]] | None, teacher: Teacher | None, goal: Goal,
    config: Optimisation, steps: int, seed: int, label: str, context: Context,
) -> None:
    """Trains `model` (already narrowed) towards `taught`, one entry per head or one for all, at the predicted pieces, and towards
    `teacher`'s layers at all pieces of a caption, masked or not. At the prefix, which sees no caption, nothing is compared."""
    where = device()
    model.to(where).train()
    model.encoder.eval()
    trained = language(model)
    states = {"hidden", "attention"} & set(goal.match)
    maps = nn.ModuleList()
    if states:
        teacher.to(where)
        pairs = layer_map(len(model.fusion.layers), teacher.layers)
        maps.extend(nn.Linear(model.word.shape[1], teacher.hidden) for _ in pairs)
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        maps.to(where)
    batch_of = data.batches(config.batch_images, seed, model.config.mask_piece, context.share)
    matched = data.steps(goal.match_epochs, config.batch_images) if states and goal.match_epochs else 0

    def loss_of(step: int) -> Tensor:
        batch = batch_of(step)
        grid = data.grid_of(model, batch.images)
        mask, real, own = batch.mask(model.config.prefix), batch.targets != IGNORED, batch.segments > 0
        seen: list | None = [] if step < matched else None
        hidden = model.states(grid, batch.tokens, batch.positions, mask, probe=seen)
        loss = head_loss(model, hidden[real], batch, taught, goal, config.label_smoothing)
        if seen is not None:
            shown = teacher.probe(grid, batch.tokens, batch.positions, batch.mask(teacher.prefix))
            for mine, linear, index in zip(seen, maps, pairs, strict=True):
                if "hidden" in goal.match:
                    loss = loss + goal.hidden_weight * hidden_loss(linear(mine[0]), shown[index][0], own) / len(pairs)
                if "attention" in goal.match:
                    loss = loss + goal.attention_weight * attention_loss(mine[1], shown[index][1], own) / len(pairs)
        return loss

    trained["maps"] = maps
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [Group(parameters, config.learning_rate)]
    fit(trained, groups, steps, loss_of, config, seed, context.work, label, context.progress, context.share)
    model.cpu().eval().requires_grad_(True)


def head_loss(model: LightCap, states: Tensor, batch: Batch, taught: list | None, goal: Goal, smoothing: float) -> Tensor:
    """The mean over heads of what each learns, from the captions and from its teachers. states (n, hidden) at the predicted places."""
    branches = model.heads.branch_states(states)
    heads, n, _ = branches.shape
    ids = batch.targets[batch.targets != IGNORED].view(1, n, 1)
    if taught is not None:
        best_ids, best = taught_at(taught, batch, states.device)  # (teachers, n, k)
        if goal.ensemble != "each":  # every head is asked for every teacher's pieces
            best_ids = best_ids.transpose(0, 1).flatten(1).unsqueeze(0)
        ids = torch.cat([ids.expand(len(best_ids), -1, -1), best_ids], -1)
    ids = ids.expand(heads, -1, -1).flatten(0, 1)
    logits = logits_at(branches.flatten(0, 1), model.word, model.heads.bias, ids)
    loss = caption_loss(logits, smoothing)
    if taught is None:
        return loss
    logs = logits.logs[:, 1:]
    if goal.temperature != 1.0:
        logs = logits_at(branches.flatten(0, 1) / goal.temperature, model.word, model.heads.bias / goal.temperature, ids[:, 1:]).logs
    return (1 - goal.token_weight) * loss + goal.token_weight * ensemble_loss(logs.unflatten(0, (heads, n)), best, goal)


def ensemble_loss(logs: Tensor, best: Tensor, goal: Goal) -> Tensor:
    """logs (heads, n, k), or (heads, n, teachers * k) but for `each`; the teachers' probabilities `best` (teachers, n, k). The mean over
    heads and, in `all` and `running`, over what a head learns from."""
    heads, (teachers, _, k) = len(logs), best.shape
    if goal.ensemble == "each":
        return token_loss(logs.flatten(0, 1), best.expand(heads, -1, -1).flatten(0, 1), goal.temperature)
    logs = logs.unflatten(2, (teachers, k)).transpose(1, 2)  # (heads, teachers, n, k)
    if goal.ensemble == "all":
        return token_loss(logs.flatten(0, 2), best.expand(heads, -1, -1, -1).flatten(0, 2), goal.temperature)
    learned = []
    for head in range(heads):
        own = head % teachers
        lessons = [token_loss(logs[head, own], best[own], goal.temperature)]
        if head:
            before = logs[:head, own].detach().exp().mean(0)
            lessons.append(token_loss(logs[head, own], before, goal.temperature))
        learned.append(torch.stack(lessons).mean())
    return torch.stack(learned).mean()


def taught_at(taught: list[tuple[np.ndarray, np.ndarray]], batch: Batch, where: torch.device) -> tuple[Tensor, Tensor]:
    """(teachers, n, k) ids and probabilities at the places of `batch`."""
    ids = torch.from_numpy(np.stack([ids[batch.rows] for ids, _ in taught])).to(where).long()
    best = torch.from_numpy(np.stack([best[batch.rows] for _, best in taught])).to(where).float()
    return ids, best
