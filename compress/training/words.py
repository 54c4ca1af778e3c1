"""Which words belong to a picture, asked of every place of its grid: a short way for an encoder to learn what captions speak of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.training.batches import IGNORED


class Words(nn.Module):
    """Multi-instance word classifier (Fang et al., CVPR 2015): a picture has a word as far as its best places have it."""

    def __init__(self, channels: int, places: int, shares: Tensor) -> None:
        """`shares` (V,): the share of pictures that have each word, which is what an untrained classifier on `places` places answers."""
        super().__init__()
        self.classify = nn.Linear(channels, len(shares))
        nn.init.normal_(self.classify.weight, std=0.01)
        self.classify.bias.data.copy_(torch.logit(shares.clamp(1e-3, 1 - 1e-3)) - math.log(places))

    def loss(self, grid: Tensor, said: Tensor) -> Tensor:
        """grid (B, G, channels), `said` (B, T) ids of the captions' pieces or IGNORED -> binary cross-entropy summed over words, averaged
        over pictures."""
        logits = self.classify(grid).logsumexp(1)
        present = torch.zeros_like(logits).scatter_add_(1, said.clamp(min=0), (said != IGNORED).to(logits.dtype))
        return F.binary_cross_entropy_with_logits(logits, present.clamp(max=1), reduction="sum") / len(grid)
