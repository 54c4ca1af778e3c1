"""Do these concepts belong to this picture? Asked in cross-modal pre-training with half of the concepts replaced (as Oscar does)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matching(nn.Module):
    """A classifier on [CLS], which sees concepts and grid alone; it is thrown away after training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.classify = nn.Linear(hidden, 1)
        nn.init.normal_(self.classify.weight, std=0.02)

    def loss(self, states: Tensor, replaced: Tensor) -> Tensor:
        """states (B, hidden) of [CLS], replaced (B,) bool -> binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(self.classify(states).squeeze(1).float(), replaced.float())


def replace(concepts: Tensor) -> tuple[Tensor, Tensor]:
    """concepts (B, K) -> the same with about half of the rows replaced by the next picture's, and which ones (B,) bool. A row that the
    next picture shares is not replaced, and one row stays in any case, for captions to be learned from."""
    other = concepts.roll(1, 0)
    replaced = (torch.rand(len(concepts), device=concepts.device) < 0.5) & (other != concepts).any(1)
    replaced[0] &= ~replaced.all()
    return torch.where(replaced.unsqueeze(1), other, concepts), replaced
