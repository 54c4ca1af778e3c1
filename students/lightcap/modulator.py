"""The cross-modal modulator: what the concepts say decides which channels of the grid matter (LightCap, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Modulator(nn.Module):
    """hidden -> inner -> ReLU -> channels -> sigmoid, averaged over concepts (PAPER: 312 -> 39 -> 2048, 94,127 parameters)."""

    def __init__(self, hidden: int, inner: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, inner)
        self.up = nn.Linear(inner, channels)

    def forward(self, grid: Tensor, concepts: Tensor, present: Tensor) -> Tensor:
        """grid (B, G, channels), concept word embeddings (B, K, hidden), present (B, K) bool -> the grid with its channels scaled."""
        gates = torch.sigmoid(self.up(torch.relu(self.down(concepts))))
        weight = present.unsqueeze(-1).to(gates.dtype)
        mean = (gates * weight).sum(1) / weight.sum(1).clamp(min=1)
        gate = torch.where(present.any(1, keepdim=True), mean, torch.ones_like(mean))
        return grid * gate.unsqueeze(1)
