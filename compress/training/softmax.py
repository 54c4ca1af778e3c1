"""The output softmax in blocks of rows. Logits of a batch over the whole vocabulary are the largest thing that training holds, and losses
look at little of them: the normaliser, the mean, and the logits of some pieces. So no more than a block is ever in memory (and that in the
processor's cache), and the backward pass makes each block again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512


@dataclass(frozen=True)
class Logits:
    """What losses see of logits z (n, V): `total` (n,) their logsumexp, `mean` (n,) over V, `picked` (n, k) those of the asked pieces."""

    total: Tensor
    mean: Tensor
    picked: Tensor

    @property
    def logs(self) -> Tensor:
        """Log-probabilities (n, k) of the asked pieces."""
        return self.picked - self.total.unsqueeze(-1)


def logits_at(states: Tensor, word: Tensor, bias: Tensor, ids: Tensor) -> Logits:
    """Of z = states word^T + bias; states (n, hidden), word (V, hidden), bias (V,), ids (n, k). The product runs in autocast's precision,
    everything after it in float32."""
    kind = states.device.type
    wide = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    total, picked = _Blocks.apply(states, word, bias, ids, wide)
    with torch.autocast(kind, enabled=False):
        mean = states.float() @ word.mean(0) + bias.mean()
    return Logits(total, mean, picked)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, word: Tensor, bias: Tensor, ids: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w, b = states.to(wide), word.to(wide), bias.to(wide)
        total = torch.empty(len(x), dtype=bias.dtype, device=x.device)
        picked = torch.empty(ids.shape, dtype=bias.dtype, device=x.device)
        for rows in blocks(len(x)):
            z = torch.addmm(b, x[rows], w.t()).to(bias.dtype)
            torch.gather(z, 1, ids[rows], out=picked[rows])
            most = z.amax(1, keepdim=True)
            total[rows] = z.sub_(most).exp_().sum(1).log_().add_(most.squeeze(1))
        ctx.save_for_backward(x, w, b, ids, total)
        ctx.states = states.dtype
        return total, picked

    @staticmethod
    def backward(ctx, of_total: Tensor, of_picked: Tensor):
        x, w, b, ids, total = ctx.saved_tensors
        of_states = torch.empty_like(x)
        of_word, of_bias = (torch.zeros_like(tensor, dtype=total.dtype) for tensor in (w, b))
        for rows in blocks(len(x)):
            z = torch.addmm(b, x[rows], w.t()).to(total.dtype)
            z.sub_(total[rows, None]).exp_().mul_(of_total[rows, None]).scatter_add_(1, ids[rows], of_picked[rows])
            of_bias += z.sum(0)
            z = z.to(x.dtype)
            torch.mm(z, w, out=of_states[rows])
            of_word += z.t() @ x[rows]
        return of_states.to(ctx.states), of_word, of_bias, None, None


def blocks(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]
