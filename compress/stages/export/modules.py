"""The captioner's encoder and its concept extractor as modules of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.lightcap import LightCap


class Encoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> grid (B, G, C)."""
        return self.encoder(pixels).flatten(2).transpose(1, 2)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


class ConceptScores(nn.Module):
    """`LightCap.concept_scores`. What is linear behind the ReLU is one product, of text embeddings @ second layer, where that has fewer
    weights. The logarithm of the sum of exponentials is spelled out: ONNX Runtime's own takes longer over an axis that is not the last."""

    def __init__(self, model: LightCap) -> None:
        super().__init__()
        second, matrix = model.alignment.second, model.concepts.matrix
        layers = [second, linear(matrix, torch.zeros(len(matrix)))]
        if len(matrix) * second.in_features < sum(layer.weight.numel() for layer in layers):
            weight, bias = (matrix.double() @ tensor.detach().double() for tensor in (second.weight, second.bias))
            layers = [linear(weight.float(), bias.float())]
        self.first, self.matching = model.alignment.first, nn.Sequential(*layers)
        self.register_buffer("windows", model.windows)
        self.register_buffer("prior", model.concepts.prior - torch.tensor(float(len(model.windows))).log())

    def forward(self, grid: Tensor) -> Tensor:
        """grid (N, G, C) -> log-odds (N, count) that each concept is there."""
        found = self.matching(F.relu(self.windows @ self.first(grid)))
        top = found.amax(1, keepdim=True)
        return (found - top).exp().sum(1).log() + top[:, 0] + self.prior
