"""Distillation of a captioner: tokens, hidden states and attention of its teachers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.config import Distill, Optimisation
from compress.context import Context
from compress.training.batches import IGNORED, Batch
from compress.training.corpus import Corpus
from compress.training.features import device
from compress.training.lessons import Lessons
from compress.training.loop import Group, fit
from compress.training.losses import attention_loss, caption_loss, hidden_loss, token_loss
from compress.training.mentions import concept_loss
from compress.training.softmax import logits_at
from compress.training.start import language, ready
from students.lightcap import LightCap
from students.lightcap.bert import layer_map
from students.lightcap.norms import folded


@dataclass(frozen=True)
class Goal:
    """What is compared, and its weight. `token_weight` is the share of the teachers' tokens against the captions' own; hidden states and
    attention are added during the first `match_epochs` epochs, the odds of concepts throughout. `ensemble` is what a head learns tokens
    from: `each` from its own teacher (LightCap), `all` from all of them, `running` from its own and the mean of the heads before it."""

    match: tuple[str, ...]
    match_epochs: float = 0.0
    temperature: float = 1.0
    token_weight: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    concept_weight: float = 0.0
    ensemble: str = "each"


def feed_forward(own: int | None, share: float | None, teacher: int) -> int | None:
    """A new student's feed-forward width: its own, if any; `share` of its teacher's, to a multiple of 8; or None, its preset's."""
    return own if own or not share else max(8, round(teacher * share / 8) * 8)


def distil(
    model: LightCap, data: Corpus, lessons: Lessons, goal: Goal, config: Optimisation, steps: int, seed: int, label: str, context: Context
) -> None:
    """Trains `model` (already narrowed) towards what `lessons` tell, of one teacher per head or of one for all, at the predicted pieces,
    and towards its guide's layers at all pieces of a caption, masked or not. At the prefix, which sees no caption, nothing is compared. Its
    encoder is trained with it where `config` says so."""
    where = device()
    model.to(where).train()
    anew = isinstance(config, Distill) and config.anew
    tuned = anew and config.encoder == "tuned"
    model.encoder.eval()
    if anew:
        ready(model.encoder, tuned, context.recipe.student)
    trained = language(model)
    guide, maps = lessons.guide, nn.ModuleList()
    if guide is not None:
        guide.to(where)
        pairs = layer_map(len(model.fusion.layers), guide.layers)
        maps.extend(nn.Linear(model.word.shape[1], guide.hidden) for _ in pairs)
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        maps.to(where)
    batch_of = data.batches(config.batch_images, seed, model.config.mask_piece, context.share)
    matched = data.steps(goal.match_epochs, config.batch_images) if guide is not None and goal.match_epochs else 0

    def loss_of(step: int) -> Tensor:
        batch = batch_of(step)
        grid, grids = lessons.look(batch.images)
        mask, real, own = batch.mask(model.config.prefix), batch.targets != IGNORED, batch.segments > 0
        seen: list | None = [] if step < matched else None
        hidden = model.states(grid, batch.tokens, batch.positions, mask, probe=seen)
        taught = lessons.told(batch, grids) if lessons.told else None
        loss = head_loss(model, hidden[real], batch, taught, goal, config.label_smoothing)
        if lessons.odds:
            loss = loss + goal.concept_weight * concept_loss(model.concept_scores(grid), lessons.odds(grids))
        if seen is not None:
            shown = guide.probe(grids[0], batch.tokens, batch.positions, batch.mask(guide.prefix))
            for mine, linear, index in zip(seen, maps, pairs, strict=True):
                if "hidden" in goal.match:
                    loss = loss + goal.hidden_weight * hidden_loss(linear(mine[0]), shown[index][0], own) / len(pairs)
                if "attention" in goal.match:
                    loss = loss + goal.attention_weight * attention_loss(mine[1], shown[index][1], own) / len(pairs)
        return loss

    trained["maps"] = maps
    groups = [Group([p for p in trained.parameters() if p.requires_grad], config.learning_rate)]
    if tuned:
        trained["encoder"] = model.encoder.requires_grad_(True)
        if lessons.odds:
            trained["alignment"] = model.alignment.requires_grad_(True)
        parts = [trained[name] for name in ("encoder", "alignment") if name in trained]
        groups.append(Group([p for part in parts for p in part.parameters()], config.encoder_learning_rate))
    with ExitStack() as stack:
        for encoder in (*([model.encoder] if anew else []), *lessons.encoders):
            stack.enter_context(folded(encoder, model.config.image_size))
        fit(trained, groups, steps, loss_of, config, seed, context.work, label, context.progress, context.share)
    model.cpu().eval().requires_grad_(True)


def head_loss(
    model: LightCap, states: Tensor, batch: Batch, taught: tuple[Tensor, Tensor] | None, goal: Goal, smoothing: float
) -> Tensor:
    """The mean over heads of what each learns, from the captions and from its teachers: `taught`, their ids and probabilities
    (teachers, n, k). states (n, hidden) at the predicted places."""
    branches = model.heads.branch_states(states)
    heads, n, _ = branches.shape
    ids = batch.targets[batch.targets != IGNORED].view(1, n, 1)
    if taught is not None:
        best_ids, best = taught
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
