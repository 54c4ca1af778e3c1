"""The fusion transformer, in BERT's layout, under the sequence-to-sequence mask.

A sequence is [prefix | caption]. The prefix (concepts and grid tokens) attends to itself and never to the caption, so its keys and values
are computed once per image; a caption token attends to the prefix and to itself and what came before it. In the last layer nothing reads
the prefix's own output, so there only its keys and values are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.lightcap.config import PREFIX_POSITION
from students.lightcap.dropout import Dropout


class Seen(NamedTuple):
    """One layer's keys and values: of the prefix of B images, each (B, heads, P, head_dim), and of the captions so far, k for each image
    one after the other, each (B * k, heads, T, head_dim); None before the first piece. A prefix is never copied for its captions."""

    keys: Tensor
    values: Tensor
    own_keys: Tensor | None = None
    own_values: Tensor | None = None

    @property
    def own_length(self) -> int:
        return 0 if self.own_keys is None else self.own_keys.shape[2]

    def rows(self, captions: Tensor, images: Tensor | None) -> Seen:
        """Those `captions` (and `images`, if not all) alone, in their order."""
        keys, values = (self.keys, self.values) if images is None else (self.keys[images], self.values[images])
        return Seen(keys, values, self.own_keys[captions], self.own_values[captions])


Past = list[Seen]  # per layer


def attention(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of the attention matrix, (N, heads, T, S), of queries (N, heads, T, head_dim) and keys (N, heads, S, head_dim).

    Training on a CPU computes them in full: there the backward pass of SDPA is slower in bf16, and no faster in fp32.
    """
    n, heads, length, size = queries.shape
    blank = queries.new_zeros(1, 1, 1, 1)
    scores = blank if mask is None else blank.expand(mask.shape).masked_fill(~mask, float("-inf"))
    scores = scores.expand(n, heads, length, keys.shape[2]).flatten(0, 1)
    scores = torch.baddbmm(scores, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=size**-0.5)
    return scores.softmax(-1).unflatten(0, (n, heads))


def attend(queries: Tensor, seen: Seen, mask: Tensor | None) -> Tensor:
    """Attention of caption pieces (B * k, heads, T, head_dim) to their image's prefix and to their own caption, all at once for an image's
    k captions. `mask` (1, 1, T, own T) bool."""
    n, heads, length, size = queries.shape
    images, prefix = len(seen.keys), seen.keys.shape[2]

    def by_image(x: Tensor) -> Tensor:  # (B * k, heads, T, ...) -> (B, heads, k * T, ...)
        return x.unflatten(0, (images, n // images)).transpose(1, 2).flatten(2, 3)

    def by_caption(x: Tensor) -> Tensor:
        return x.unflatten(2, (n // images, length)).transpose(1, 2).flatten(0, 1)

    among = queries @ seen.own_keys.transpose(2, 3)
    if mask is not None:
        among = among.masked_fill(~mask, float("-inf"))
    scores = torch.cat([by_caption(by_image(queries) @ seen.keys.transpose(2, 3)), among], -1) * size**-0.5
    before, own = scores.softmax(-1).split([prefix, among.shape[-1]], -1)
    return by_caption(by_image(before) @ seen.values) + own @ seen.own_values


class Layer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a LayerNorm after it (post-norm, as BERT).

    Attention is four plain Linears: what quantizers and pruners understand. The number of heads follows from `query`'s width.
    """

    def __init__(self, hidden: int, head_dim: int, width: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(hidden, width)
        self.key = nn.Linear(hidden, width)
        self.value = nn.Linear(hidden, width)
        self.output = nn.Linear(width, hidden)
        self.norm1 = nn.LayerNorm(hidden, eps=1e-12)
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-12)
        self.dropout = Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return x.view(n, length, width // self.head_dim, self.head_dim).transpose(1, 2)

    def forward(
        self, x: Tensor, past: Seen | None, mask: Tensor | None, first: int, probe: list | None = None
    ) -> tuple[Tensor, Seen]:
        """x (N, S, hidden): prefix and captions, or captions' next pieces after `past`. mask (N or 1, 1, S - first, S), or after `past`
        (1, 1, S, own length): bool, True where attention is allowed, None for everywhere. Queries are made for x[:, first:] alone. Returns
        the new states (N, S - first, hidden) and what is seen from now on."""
        keys, values = self.split(self.key(x)), self.split(self.value(x))
        x = x[:, first:]
        queries = self.split(self.query(x))
        if past is not None:
            if past.own_keys is not None:
                keys, values = torch.cat([past.own_keys, keys], 2), torch.cat([past.own_values, values], 2)
            seen = Seen(past.keys, past.values, keys, values)
            mixed = attend(queries, seen, mask)
        elif probe is None and (mask is None or x.is_cuda or not torch.is_grad_enabled()):
            seen = Seen(keys, values)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        else:
            seen = Seen(keys, values)
            rows = attention(queries, keys, mask)
            mixed = rows @ values
            if probe is not None:
                probe.append(rows)
        x = self.norm1(x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2))))
        x = self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return x, seen


class Fusion(nn.Module):
    def __init__(
        self, vocabulary: int, positions: int, hidden: int, layers: int, attention_heads: int, ffn: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.segment = nn.Embedding(2, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.grid = nn.Linear(channels, hidden)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(Layer(hidden, hidden // attention_heads, hidden, ffn, dropout) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed_prefix(self, grid: Tensor, concepts: Tensor | None = None) -> Tensor:
        """grid (B, G, channels) and concept embeddings (B, K, hidden) -> (B, K + G, hidden)."""
        tokens = self.grid(grid)
        if concepts is not None:
            tokens = torch.cat([concepts, tokens], 1)
        place = self.position.weight[PREFIX_POSITION : PREFIX_POSITION + tokens.shape[1]]
        return self.dropout(self.norm(tokens + (place + self.segment.weight[1])))

    def embed_caption(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions (N, T) -> (N, T, hidden)."""
        return self.dropout(self.norm(self.word(tokens) + (self.position(positions) + self.segment.weight[0])))

    def forward(
        self, x: Tensor, first: int, past: Past | None = None, mask: Tensor | None = None, probe: list | None = None
    ) -> tuple[Tensor, Past]:
        """x (N, S, hidden), of which x[:, :first] is prefix. Returns the caption's states (N, S - first, hidden) and the keys and values.
        `mask` (N or 1, 1, S, S), after `past` (1, 1, S, own length). `probe`, a list, receives per layer (caption states, caption rows of
        the attention matrix)."""
        present: Past = []
        for index, layer in enumerate(self.layers):
            skip = first if index + 1 == len(self.layers) else 0
            attention: list | None = None if probe is None else []
            here = mask if mask is None or not skip else mask[:, :, skip:]
            x, pair = layer(x, past[index] if past else None, here, skip, attention)
            present.append(pair)
            if probe is not None:
                seen = 0 if skip else first
                probe.append((x[:, seen:], attention[0][:, :, seen:]))
        return x, present
