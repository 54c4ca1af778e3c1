"""The cross-modal modulator: what the concepts say decides which channels of the grid matter (LightCap, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Modulator(nn.Module):
    """hidden -> inner -> ReLU -> channels -> sigmoid, averaged over concepts' word pieces (PAPER: 312 -> 39 -> 2048, 94,127 parameters)."""

    def __init__(self, hidden: int, inner: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, inner)
        self.up = nn.Linear(inner, channels)

    def forward(self, grid: Tensor, concepts: Tensor) -> Tensor:
        """grid (B, G, channels), embeddings of concept word pieces (B, K, hidden) -> the grid with its channels scaled."""
        gates = torch.sigmoid(self.up(torch.relu(self.down(concepts))))
        return grid * gates.mean(1, keepdim=True)
