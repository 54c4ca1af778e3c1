"""The captioner as modules that ONNX traces well: products in the layout of MatMul, attention spelled out, heads folded, the word embedding
held once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.lightcap import LightCap
from students.lightcap.fusion import PREFIX_POSITION

ATTENTION, MEMORY = ("query", "key", "value"), ("key", "value")


class Encoder(nn.Module):
    def __init__(self, model: LightCap) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> grid (B, G, C)."""
        return self.encoder(pixels).flatten(2).transpose(1, 2)


class Product(nn.Module):
    """A Linear with its weight held as (in, out): the layout of MatMul and MatMulInteger, so that nothing is copied. One that smooths what
    it reads (`quantize.smoothquant`) does so here too."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inverse", getattr(linear, "inverse", None))
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.inverse is None else x * self.inverse) @ self.weight + self.bias


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def stacked(*linears: nn.Linear) -> nn.Linear:
    """One Linear that gives what `linears`, which read the same, give one after the other."""
    return linear(torch.cat([one.weight for one in linears]), torch.cat([one.bias for one in linears]))


class DecoderLayer(nn.Module):
    """`students.lightcap.fusion.Layer`, its attention spelled in matrix products (SDPA's export has more shape operators). In the `last`
    layer nobody asks for the prefix's states, so that its queries are a product of their own."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.head_dim, self.heads = layer.head_dim, layer.query.out_features // layer.head_dim
        self.query = Product(layer.query) if last else None
        self.attention = Product(stacked(*(getattr(layer, name) for name in (MEMORY if last else ATTENTION))))
        for name in ("output", "up", "down"):
            setattr(self, name, Product(getattr(layer, name)))
        self.norm1, self.norm2 = layer.norm1, layer.norm2

    def prefix(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """x (N, P, hidden) -> states (None in the last layer), keys and values, each (N, heads, P, head width)."""
        *queries, key, value = self.split(self.attention(x), 3 if self.query is None else 2)
        return (self.rest(x, self.scores(queries[0], key).softmax(-1) @ value) if queries else None), key, value

    def step(self, x: Tensor, prefix: Sequence[Tensor], past: Sequence[Tensor], unseen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, hidden), and keys and values of the prefix and of the caption so far, each (N, heads, length, head width). `unseen`
        (T, past + T) is added to the scores of the caption's pieces. Returns states, and the keys and values of past and x."""
        *queries, key, value = self.split(self.attention(x), 3 if self.query is None else 2)
        [query] = queries or self.split(self.query(x), 1)
        keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        before, own = self.scores(query, prefix[0]), self.scores(query, keys)
        weights = torch.cat([before, own if unseen is None else own + unseen], 3).softmax(-1)
        of_prefix, of_own = weights.split([prefix[0].shape[2], keys.shape[2]], 3)
        return self.rest(x, of_prefix @ prefix[1] + of_own @ values), keys, values

    def split(self, x: Tensor, parts: int) -> Sequence[Tensor]:
        """(N, S, parts x heads x width) -> each part (N, heads, S, width). Of a single position nothing is moved."""
        if x.shape[1] == 1:
            return x.reshape(-1, parts * self.heads, 1, self.head_dim).chunk(parts, 1)
        return x.unflatten(2, (parts * self.heads, self.head_dim)).transpose(1, 2).chunk(parts, 1)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(2, 3) * self.head_dim**-0.5

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x (N, S, hidden), and what attention mixed (N, heads, S, width) -> states (N, S, hidden)."""
        width = self.heads * self.head_dim
        mixed = mixed.reshape(-1, 1, width) if x.shape[1] == 1 else mixed.transpose(1, 2).flatten(2)
        x = self.norm1(x + self.output(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


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


class Extractor(nn.Module):
    """grid (N, G, C) -> the word pieces (N, K) of the concepts in it."""

    def __init__(self, model: LightCap) -> None:
        super().__init__()
        self.scores, self.known, self.most = ConceptScores(model), model.concepts, model.config.concepts
        self.scores.first = Product(self.scores.first)
        self.scores.matching = nn.Sequential(*map(Product, self.scores.matching))

    def forward(self, grid: Tensor) -> Tensor:
        return self.known.choose(self.scores(grid), self.most)


class Branches(nn.Module):
    """The mean of all heads' states. Their transforms are one product; a norm's scale and shift are taken behind it, head by head."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.transform = Product(stacked(*(head.transform for head in heads.branches)))
        norms = [head.norm for head in heads.branches]
        self.eps, self.count = norms[0].eps, len(norms)
        self.scale = nn.Parameter(torch.stack([norm.weight.detach() for norm in norms]) / self.count, requires_grad=False)
        self.shift = nn.Parameter(torch.stack([norm.bias.detach() for norm in norms]).mean(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, hidden) -> (N, T, hidden)."""
        states = F.gelu(self.transform(x)).unflatten(2, (self.count, x.shape[2]))
        return (F.layer_norm(states, states.shape[3:], eps=self.eps) * self.scale).sum(2) + self.shift


class Modulation(nn.Module):
    """`students.lightcap.modulator.Modulator`."""

    def __init__(self, modulator: nn.Module) -> None:
        super().__init__()
        self.down, self.up = Product(modulator.down), Product(modulator.up)

    def forward(self, grid: Tensor, words: Tensor) -> Tensor:
        return grid * torch.sigmoid(self.up(F.relu(self.down(words)))).mean(1, keepdim=True)


class Decoder(nn.Module):
    """The weights of both `Prefix` and `Step`. The word embedding is held once, as (hidden, V): looked up by column, and multiplied by as
    it stands for the logits. Heads are folded: one vocabulary product of their mean."""

    def __init__(self, model: LightCap) -> None:
        super().__init__()
        fusion = model.fusion
        self.vocabulary = nn.Parameter(model.word.detach().T.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(model.heads.bias.detach().clone(), requires_grad=False)
        self.grid, self.norm = Product(fusion.grid), fusion.norm
        position, segment = fusion.position.weight.detach(), fusion.segment.weight.detach()
        self.places = nn.Parameter(position[:PREFIX_POSITION] + segment[0], requires_grad=False)
        longest = PREFIX_POSITION + model.config.prefix
        self.prefix_places = nn.Parameter(position[PREFIX_POSITION:longest] + segment[1], requires_grad=False)
        self.modulator = Modulation(model.modulator) if model.modulator is not None else None
        self.layers = nn.ModuleList(DecoderLayer(layer, index + 1 == len(fusion.layers)) for index, layer in enumerate(fusion.layers))
        self.branches = Branches(model.heads)

    def lookup(self, tokens: Tensor) -> Tensor:
        """tokens (N, T) -> (N, T, hidden)."""
        columns = torch.index_select(self.vocabulary, 1, tokens.flatten())
        return columns.T.view(*tokens.shape, len(self.vocabulary))


class Prefix(Decoder):
    def forward(self, grid: Tensor, concepts: Tensor | None = None) -> tuple[Tensor, ...]:
        """grid (N, G, C), and concepts (N, K) word pieces, for a model that reads them -> keys and values layer by layer, each
        (N, heads, K + G, head width): every position of a prefix sees every other."""
        if concepts is None:
            shown = self.grid(grid)
        else:
            words = self.lookup(concepts)
            shown = torch.cat([words, self.grid(grid if self.modulator is None else self.modulator(grid, words))], 1)
        x, found = self.norm(shown + self.prefix_places), []
        for layer in self.layers:
            x, *seen = layer.prefix(x)
            found += seen
        return tuple(found)


class Step(Decoder):
    def forward(self, tokens: Tensor, positions: Tensor, prefix: list[Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        """tokens, positions (N, T): a token, and for a model of masked pieces [MASK] behind it, which it does not see; keys and values of
        the prefix, and of the caption so far, layer by layer, each (N, heads, length, width).

        Returns logits (N, 1, V) of the last, then the keys and values of past and of what was read here."""
        x = self.norm(self.lookup(tokens) + F.embedding(positions, self.places))
        unseen = later_tokens(tokens.shape[1], past[0].shape[2], x) if tokens.shape[1] > 1 else None
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            pair = slice(2 * index, 2 * index + 2)
            x, *seen = layer.step(x, prefix[pair], past[pair], unseen)
            present += seen
        last = x if x.shape[1] == 1 else x[:, -1:]
        return self.branches(last) @ self.vocabulary + self.bias, *present


def stacks(model: LightCap) -> dict[str, list[str]]:
    """Each weight of `Decoder` that is several of `model`'s, one after the other -> their names there."""
    last, found = len(model.fusion.layers) - 1, {}
    for index in range(last + 1):
        names = MEMORY if index == last else ATTENTION
        found[f"layers.{index}.attention.weight"] = [f"fusion.layers.{index}.{name}.weight" for name in names]
    found["branches.transform.weight"] = [f"heads.branches.{index}.transform.weight" for index in range(len(model.heads.branches))]
    return found


def later_tokens(tokens: int, past: int, like: Tensor) -> Tensor:
    """(tokens, past + tokens): a large negative number where a token would see a later one, else 0."""
    later = torch.ones(tokens, tokens, dtype=like.dtype).triu(1) * -1e9
    return torch.cat([torch.zeros(tokens, past, dtype=like.dtype), later], 1)
