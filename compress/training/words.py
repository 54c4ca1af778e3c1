"""Which words belong to a picture, asked of every place of its grid: a short way for an encoder to learn what captions speak of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.training.batches import IGNORED


class Words(nn.Module):
    """Multi-instance word classifier (Fang et al., CVPR 2015): a picture has a word as far as its best places have it."""

    def __init__(self, channels: int, vocabulary: int) -> None:
        super().__init__()
        self.classify = nn.Linear(channels, vocabulary)

    def loss(self, grid: Tensor, targets: Tensor) -> Tensor:
        """grid (B, G, channels), targets (B, T) ids or IGNORED -> binary cross-entropy summed over words, averaged over pictures."""
        logits = self.classify(grid).logsumexp(1)
        present = torch.zeros_like(logits)
        present.scatter_(1, targets.clamp(min=0), (targets != IGNORED).to(logits.dtype), reduce="add")
        return F.binary_cross_entropy_with_logits(logits, present.clamp(max=1), reduction="sum") / len(grid)
