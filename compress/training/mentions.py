"""Which concepts a picture's captions mention, and how well an extractor finds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data import CaptionSet
from compress.data.concepts import Mentions
from students.lightcap import LightCap
from students.lightcap.concepts import NONE

BATCH = 256


def mentioned(data: CaptionSet, concepts: Sequence[str]) -> Tensor:
    """(N, count) bool: whether any caption of the picture mentions the concept."""
    mentions = Mentions(concepts)
    found = torch.zeros(len(data.examples), len(concepts), dtype=torch.bool)
    for row, example in enumerate(data.examples):
        found[row, sorted(frozenset().union(*map(mentions.mentioned, example.captions)))] = True
    return found


def concept_loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Log-odds (B, count) that a picture shows each concept, and whether its captions mention it (B, count) -> binary cross-entropy summed
    over concepts, averaged over pictures."""
    return F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum") / len(scores)


def best_concepts(scores: Tensor, pieces: Tensor, most: int) -> Tensor:
    """scores (B, count), word pieces (count, longest) -> (B, count) bool: the best ones, as many as fit whole into `most` pieces."""
    order = scores.topk(min(most, scores.shape[1]), dim=1).indices
    fits = (pieces[order] != NONE).sum(-1).cumsum(1) <= most
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, fits)


@torch.inference_mode()
def precision_recall(model: LightCap, features: np.ndarray, wanted: Tensor) -> tuple[float, float]:
    """Of the concepts that `model` puts into its prefix, over all pictures together. features (N, G, channels); wanted (N, count)."""
    hits = found = 0
    for start in range(0, len(features), BATCH):
        grid = torch.from_numpy(np.array(features[start : start + BATCH])).float()
        best = best_concepts(model.concept_scores(grid), model.concepts.pieces, model.config.concepts)
        hits += int((best & wanted[start : start + BATCH]).sum())
        found += int(best.sum())
    return hits / max(found, 1), hits / max(int(wanted.sum()), 1)
