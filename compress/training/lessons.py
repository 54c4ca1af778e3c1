"""What a student learns from in a step: what it sees, what its teachers see, and what they say of it.

Of pictures as they are the teachers' tokens are read from targets computed once, and one grid serves all. Of pictures that are disturbed
anew in each step, or seen by an encoder that is tuned, each teacher is asked there and then, behind an encoder of its own: student and
teacher always look at the same picture (Beyer et al., *Knowledge distillation: A good teacher is patient and consistent*, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.config import Distill
from compress.context import Context
from compress.training.batches import IGNORED, Batch, pack
from compress.training.corpus import Corpus, disturbed
from compress.training.features import device, encoder_digest, normalised, pixels
from compress.training.loop import settled
from compress.training.targets import targets
from students.lightcap import LightCap
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Lessons:
    """`look(images)` gives the grid that the student sees and the one that each teacher does, (B, G, channels) each; `told(batch, grids)`
    ids and probabilities (teachers, n, k) of what teachers say where `batch` has a target, None where nobody is asked; `odds(grids)` those
    (B, count) that they give to each concept, on average. `guide`, the first teacher, shows its layers; `encoders` are teachers' own."""

    look: Callable[[np.ndarray], tuple[Tensor, list[Tensor]]]
    told: Callable[[Batch, list[Tensor]], tuple[Tensor, Tensor]] | None = None
    odds: Callable[[list[Tensor]], Tensor] | None = None
    guide: Teacher | None = None
    encoders: tuple[nn.Module, ...] = ()


def guided(config: Distill) -> bool:
    """Whether the first teacher's layers are learned from."""
    return not {"hidden", "attention"}.isdisjoint(config.match)


def listened_to(config: Distill) -> tuple[str, ...]:
    """The teachers from which something is learned: all by their tokens, the first by its layers and its concepts."""
    return config.teachers if config.asks_tokens else config.teachers[: guided(config) or config.concept_weight > 0]


def from_targets(
    model: LightCap, data: Corpus, taught: list[tuple[np.ndarray, np.ndarray]] | None, guide: Teacher | None = None
) -> Lessons:
    """All see the student's grid; tokens are those of `taught`, one entry for each teacher."""

    def look(images: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        grid = data.grid_of(model, images)
        return grid, [grid]

    def told(batch: Batch, grids: list[Tensor]) -> tuple[Tensor, Tensor]:
        return taught_at(taught, batch, grids[0].device)

    return Lessons(look, None if taught is None else told, guide=guide)


def asked(
    model: LightCap, data: Corpus, teachers: Sequence[Teacher], settings: dict, config: Distill, context: Context
) -> Lessons:
    """Those of `teachers` that are listened to look at the training pictures that the student sees, each by its own encoder; by the
    student's, where that is the same and not tuned. One that is named twice is asked once."""
    where = device()
    pictures = pixels(context.data.split("train"), settings, context.cache, context.progress)
    tuned = config.encoder == "tuned"
    teachers = teachers[: len(listened_to(config))]
    own = None if tuned else encoder_digest(model.encoder)
    names = [encoder_digest(teacher.encoder) for teacher in teachers]
    lookers = {name: teacher for name, teacher in zip(names, teachers, strict=True) if name != own}
    for teacher in teachers:
        teacher.to(where)
        teacher.encoder.to(memory_format=torch.channels_last)

    def look(images: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        seen = disturbed(normalised(pictures[images], settings, where), config.flip, config.crop)
        with torch.set_grad_enabled(tuned):
            grid = model.encode(seen)
        grids = {name: teacher.encode(seen) for name, teacher in lookers.items()}
        return grid, [grids.get(name, grid) for name in names]

    def told(batch: Batch, grids: list[Tensor]) -> tuple[Tensor, Tensor]:
        whole, said = batch, {}
        if model.config.mask_piece is not None:  # its own captions have holes; a teacher reads all that stands before a piece
            whole = pack(data.captions, batch.images).to(where)
        wanted = torch.from_numpy(np.isin(whole.rows, batch.rows)).to(where)
        for teacher, grid in dict(zip(teachers, grids, strict=True)).items():
            asked = whole.probing(teacher.mask_piece)
            real = asked.targets != IGNORED
            real = real.masked_scatter(real, wanted)
            logits = teacher.logits(grid, asked.tokens, asked.positions, asked.mask(teacher.prefix), real)
            said[teacher] = (logits.float() / config.temperature).softmax(-1).topk(min(config.top_k, logits.shape[-1]), dim=-1)
        return tuple(torch.stack([said[teacher][part] for teacher in teachers]) for part in (1, 0))

    def odds(grids: list[Tensor]) -> Tensor:
        given = [teacher.concept_scores(grid).sigmoid() for teacher, grid in zip(teachers, grids, strict=True)]
        return torch.stack(given).mean(0)

    return Lessons(
        look, told if config.asks_tokens else None, odds if config.concept_weight else None, teachers[0] if guided(config) else None,
        tuple(teacher.encoder for teacher in lookers.values()),
    )


def teach(
    teachers: Sequence[Teacher], sources: Sequence[Artifact], data: Corpus, top_k: int, temperature: float, precision: str,
    names: Sequence[str], context: Context,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each teacher's ids and probabilities over the training captions."""
    chosen = settled(precision, device(), context.work, context.share)
    mark = context.data.split("train").fingerprint
    return [
        targets(teacher, source.digest(), data, mark, top_k, temperature, chosen, context.cache, name, context.progress)
        for teacher, source, name in zip(teachers, sources, names, strict=True)
    ]


def taught_at(taught: list[tuple[np.ndarray, np.ndarray]], batch: Batch, where: torch.device) -> tuple[Tensor, Tensor]:
    """(teachers, n, k) ids and probabilities at the places of `batch`."""
    ids = torch.from_numpy(np.stack([ids[batch.rows] for ids, _ in taught])).to(where).long()
    best = torch.from_numpy(np.stack([best[batch.rows] for _, best in taught])).to(where).float()
    return ids, best
