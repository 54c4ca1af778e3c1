"""The paper's teacher: the student's own pipeline with a heavier fusion."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from students.lightcap import LightCap
from students.lightcap.tokenizer import pieces_of, read_tokenizer


class LightCapTeacher:
    def __init__(self, folder: Path) -> None:
        self.model = LightCap.from_pretrained(folder).requires_grad_(False)
        self.vocabulary = tuple(pieces_of(read_tokenizer(Path(folder) / "tokenizer.json")))
        self.hidden, self.layers, self.prefix = self.model.word.shape[1], self.model.config.layers, self.model.config.prefix

    @property
    def mask_piece(self) -> int | None:
        return self.model.config.mask_piece

    def own_pieces(self) -> list[int]:
        return self.model.own_pieces()

    def narrow(self, keep: Tensor) -> None:
        """Scores the word pieces `keep` alone from here on: the logits of all others are not computed."""
        self.model.narrow(keep)

    def to(self, where: torch.device) -> LightCapTeacher:
        self.model.to(where)
        return self

    @property
    def encoder(self) -> nn.Module:
        return self.model.encoder

    @property
    def concept_pieces(self) -> Tensor | None:
        return None if self.model.concepts is None else self.model.concepts.pieces

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return self.model.encode(pictures)

    @torch.no_grad()
    def concept_scores(self, grid: Tensor) -> Tensor:
        return self.model.concept_scores(grid)

    @torch.no_grad()
    def logits(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, real: Tensor) -> Tensor:
        return self.model.heads(self.model.states(grid, tokens, positions, mask)[real], self.model.word)

    @torch.no_grad()
    def probe(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []
        self.model.states(grid, tokens, positions, mask, probe=seen)
        return seen
