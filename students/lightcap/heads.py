"""Parallel prediction heads that share the word embedding as output projection (LightCap, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Linear, GELU, LayerNorm. Without the nonlinearity the average of several heads would be one linear map."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.transform = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(x)))


class Heads(nn.Module):
    def __init__(self, hidden: int, count: int, vocabulary: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Head(hidden) for _ in range(count))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for branch in self.branches:
            nn.init.normal_(branch.transform.weight, std=0.02)
            nn.init.zeros_(branch.transform.bias)

    def branch_states(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (heads, ..., hidden), of which `word` makes each head's own logits."""
        return torch.stack([branch(x) for branch in self.branches])

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """x (..., hidden), word (V, hidden) -> logits (..., V), averaged over heads. The mean of E h_i + b is E mean(h_i) + b, so any
        number of heads costs one vocabulary product. This holds for logits, not for probabilities."""
        return F.linear(self.branch_states(x).mean(0), word, self.bias)
