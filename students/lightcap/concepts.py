"""The concept extractor's learned part: region features of the grid -> CLIP's text space."""

from __future__ import annotations

from torch import Tensor, nn


class Alignment(nn.Module):
    """Two linear layers, channels -> inner -> text (PAPER: 2048 -> 1024 -> 1024, 3,147,776 parameters)."""

    def __init__(self, channels: int, inner: int, text: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, inner)
        self.act = nn.ReLU()
        self.second = nn.Linear(inner, text)

    def forward(self, regions: Tensor) -> Tensor:
        """(B, R, channels) -> (B, R, text)."""
        return self.second(self.act(self.first(regions)))
