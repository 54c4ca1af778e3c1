"""The concept extractor: what a picture shows, in words, before anything is said (LightCap, section 3.1).

Regions of the grid go through the alignment MLP into a text space, where each concept has the embedding of "a photo of a [concept]". A
concept's score is how well the picture's best regions match it, on top of how common it is. The best concepts' word pieces, exactly as
many as the config says, stand before the grid in the prefix, and steer the modulator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDES = (1, 3, 5)  # of the square windows that are looked at, in grid cells; the whole grid comes last
NONE = -1  # pads a concept's word pieces


class Alignment(nn.Module):
    """Two linear layers, channels -> inner -> text (PAPER: 2048 -> 1024 -> 1024, 3,147,776 parameters)."""

    def __init__(self, channels: int, inner: int, text: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, inner)
        self.act = nn.ReLU()
        self.second = nn.Linear(inner, text)

    def forward(self, grid: Tensor, regions: Tensor) -> Tensor:
        """grid (B, G, channels), pooling weights (R, G) or (B, R, G) whose rows sum to one -> (B, R, text). Pooling comes after the first
        layer, with which it commutes: the grid has fewer cells than there are regions."""
        return self.second(self.inner(grid, regions))

    def inner(self, grid: Tensor, regions: Tensor) -> Tensor:
        """What the second layer reads of each region, (B, R, inner)."""
        return self.act(regions @ self.first(grid))


class ConceptVocabulary(nn.Module):
    """What is known of each concept, as buffers: `matrix` (count, text) text embeddings of length one; `pieces` (count, longest) word-piece
    ids, padded with NONE; `prior` (count,) the log-odds that a training picture shows it."""

    def __init__(self, count: int, text: int, longest: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(count, text))
        self.register_buffer("pieces", torch.full((count, longest), NONE))
        self.register_buffer("prior", torch.zeros(count))

    def scores(self, regions: Tensor) -> Tensor:
        """Aligned regions (B, R, text) -> log-odds (B, count): each concept's mean odds over regions, in which the best ones prevail."""
        found = F.linear(regions, self.matrix)
        return found.logsumexp(1) - torch.tensor(float(found.shape[1])).log() + self.prior

    def choose(self, scores: Tensor, most: int) -> Tensor:
        """Scores (B, count) -> the word pieces of the best concepts, best first, cut at `most`: (B, most) ids."""
        best = scores.topk(min(most, scores.shape[1]), dim=1).indices
        flat = self.pieces[best].flatten(1)
        real = flat != NONE
        place = real.long().cumsum(1) - 1
        place = torch.where(real & (place < most), place, most)  # what is left out goes behind the end, which is dropped
        return flat.new_zeros((flat.shape[0], most + 1)).scatter(1, place, flat)[:, :most]


def windows(side: int) -> Tensor:
    """Every square window of SIDES, and the whole of a grid of side x side cells, as rows of mean-pooling weights (W, side * side)."""
    rows = []
    for size in [*(s for s in SIDES if s < side), side]:
        for top in range(side - size + 1):
            for left in range(side - size + 1):
                cells = torch.zeros(side, side)
                cells[top : top + size, left : left + size] = 1 / size**2
                rows.append(cells.flatten())
    return torch.stack(rows)


def boxes_on_grid(boxes: Tensor, side: int) -> Tensor:
    """Boxes (R, 4) as x0, y0, x1, y1 in shares of width and height -> rows of pooling weights (R, side * side), by RoI-Align."""
    from torchvision.ops import roi_align

    cells = torch.eye(side**2).view(1, side**2, side, side)
    pooled = roi_align(cells, [boxes.float() * side], output_size=1, sampling_ratio=4, aligned=True)
    return pooled.flatten(1)
