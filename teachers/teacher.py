"""What distillation asks of a teacher, whatever captioner stands behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Teacher(Protocol):
    """A captioner that scores given captions. `vocabulary` lists its word pieces by id: distilling tokens needs them equal to the
    student's (equal sizes do not make equal vocabularies). `encoder` makes the grid that it reads; `prefix` is the number of tokens before
    the caption, `concept_pieces` the word pieces of each concept that it can find (None: it finds none), `mask_piece` the id of [MASK] in
    a model that predicts the piece under it (None: it predicts the next)."""

    vocabulary: tuple[str, ...]
    encoder: nn.Module
    concept_pieces: Tensor | None
    hidden: int
    layers: int
    prefix: int
    mask_piece: int | None

    def own_pieces(self) -> list[int]:
        """The word pieces that it puts into its own input, such as those of concepts: it cannot be narrowed without them."""
        ...

    def narrow(self, keep: Tensor) -> None:
        """Scores the word pieces `keep` (ids) alone from here on."""
        ...

    def to(self, where: torch.device) -> Teacher:
        """Moves to a device, and returns itself."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Preprocessed pictures (B, 3, S, S) -> grid (B, G, channels)."""
        ...

    def concept_scores(self, grid: Tensor) -> Tensor:
        """grid (B, G, channels) -> log-odds (B, count) that the picture shows each concept."""
        ...

    def logits(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, real: Tensor) -> Tensor:
        """grid (B, G, channels); tokens, positions (B, T); mask (B, 1, P + T, P + T), P = `prefix`; real (B, T) bool -> logits (n, V) at
        the real places."""
        ...

    def probe(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer: caption states (B, T, hidden) and attention rows (B, heads, T, P + T)."""
        ...


def load(folder: Path) -> Teacher:
    """The teacher in an artifact folder. Raises FileNotFoundError or ValueError, in one line."""
    from teachers.lightcap import LightCapTeacher

    return LightCapTeacher(folder)
