"""What training minimises. Every loss is a mean over predicted word pieces, padding apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.training.softmax import Logits


def caption_loss(logits: Logits, smoothing: float, weights: Tensor | None = None) -> Tensor:
    """Label-smoothed cross-entropy; the first of the picked pieces is the true one. `weights` (n,), 1 on average
    over all training captions, if not in each batch."""
    each = logits.total - (1 - smoothing) * logits.picked[:, 0] - smoothing * logits.mean
    return each.mean() if weights is None else (each * weights).mean()


def token_loss(logs: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over the teacher's top k pieces and one bin for all others, times temperature squared (Hinton et al., 2015).

    Both (n, k) and at this temperature: `logs` the student's log-probabilities of those pieces, `probabilities` the teacher's, whose
    missing mass is the tail's.
    """
    tail = torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))
    rest = (1 - probabilities.sum(-1)).clamp(min=1e-6)
    kept = (probabilities * (probabilities.clamp(min=1e-9).log() - logs)).sum(-1)
    return (kept + rest * (rest.log() - tail)).mean() * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of caption states, (B, T, hidden) both, where `real` (B, T) is True (TinyBERT, equation 8)."""
    return F.mse_loss(student[real], teacher[real])


def attention_loss(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of the caption's attention rows, (B, heads, T, S), summed over S; averaged over heads first where the two have
    different numbers of them (TinyBERT, equation 7, but of the softmax's rows: what its authors fit are the scores before it)."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    squared = (student - teacher).square().sum(-1).mean(1)
    return squared[real].mean()
