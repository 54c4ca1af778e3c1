"""Captions from grid features: greedy, beam search, sampling, over a prefix that is computed once per image.

A caption starts after [CLS] and ends with [SEP] or after `max_tokens` pieces. The other special tokens are never produced. A finished
hypothesis is scored by its mean log-probability per produced token, [SEP] included; `compress.runtime` searches the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from students.lightcap import LightCap


@dataclass(frozen=True)
class Special:
    start: int
    end: int
    never: tuple[int, ...]

    @staticmethod
    def of(tokenizer) -> Special:
        never = (tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[MASK]"))
        return Special(tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"), tuple(i for i in never if i is not None))

    def among(self, keep: Tensor) -> Special:
        """Their places in `keep`, the ids that a model was narrowed to."""
        place = {piece: index for index, piece in enumerate(keep.tolist())}
        return Special(place[self.start], place[self.end], tuple(place[i] for i in self.never if i in place))


@dataclass(frozen=True, order=True)
class Hypothesis:
    """`score` is `logprob` (a sum, natural logarithm) over the number of produced tokens; `tokens` holds no special token."""

    score: float
    logprob: float = field(compare=False)
    tokens: tuple[int, ...] = field(compare=False)


def beam_search(model: LightCap, grid: Tensor, special: Special, beam: int = 5, max_tokens: int = 20) -> list[Hypothesis]:
    """The best hypothesis for each image of `grid` (B, G, channels). `beam=1` is greedy."""
    return [max(hypotheses) for hypotheses in beams(model, grid, special, beam, max_tokens)]


@torch.inference_mode()
def beams(model: LightCap, grid: Tensor, special: Special, beam: int, max_tokens: int = 20) -> list[list[Hypothesis]]:
    """All finished hypotheses of each image of `grid`, in no order; at least `beam` of them, where the vocabulary allows so many."""
    b = len(grid)
    where = grid.device
    past = model.prefill(grid)
    scores = torch.full((b, beam), -torch.inf, device=where)
    scores[:, 0] = 0.0
    never = torch.tensor(special.never, dtype=torch.long, device=where)
    last = torch.full((b * beam, 1), special.start, device=where)
    said: list[tuple[int, ...]] = [()] * (b * beam)  # by each row of `last`
    finished: list[list[Hypothesis]] = [[] for _ in range(b)]
    live = list(range(b))  # the images still searched, in the order of the rows of `scores`
    for position in range(max_tokens):
        logits, past = model.step(last, position, past)
        logs = logits.float().log_softmax(-1).index_fill_(1, never, -torch.inf)
        total = scores.unsqueeze(-1) + logs.view(len(live), beam, -1)
        best, index = total.flatten(1).topk(min(2 * beam, total[0].numel()), dim=1)
        kept, going = [], []  # (score, row of `last`, next piece)
        found = zip(live, best.tolist(), index.tolist(), strict=True)  # a GPU is waited for here alone
        for row, (image, values, places) in enumerate(found):
            further = []
            for rank, (value, place) in enumerate(zip(values, places, strict=True)):
                source, piece = divmod(place, logs.shape[-1])
                source += row * beam
                if value == -torch.inf:
                    continue
                if piece != special.end:
                    further.append((value, source, piece))
                elif rank < beam:
                    finished[image].append(Hypothesis(value / (len(said[source]) + 1), value, said[source]))
            if len(finished[image]) >= beam or not further:
                continue
            kept.append(row)
            going += (further + [(-torch.inf, *further[-1][1:])] * beam)[:beam]
        images = None if len(kept) == len(live) else torch.tensor(kept, device=where)
        live = [live[row] for row in kept]
        if not live:
            break
        values, sources, pieces = zip(*going, strict=True)
        said = [(*said[source], piece) for source, piece in zip(sources, pieces, strict=True)]
        scores = torch.tensor(values, device=where).view(-1, beam)
        rows = torch.tensor(sources, device=where)
        last = torch.tensor(pieces, device=where).unsqueeze(1)
        past = [seen.rows(rows, images) for seen in past]
    for row, image in enumerate(live):
        for value, history in zip(scores[row].tolist(), said[row * beam : (row + 1) * beam], strict=True):
            if value != -torch.inf:
                finished[image].append(Hypothesis(value / max(1, len(history)), value, history))
    return finished


@torch.inference_mode()
def sample(
    model: LightCap, grid: Tensor, special: Special, count: int, max_tokens: int = 20, seed: int = 0, temperature: float = 1.0
) -> list[list[Hypothesis]]:
    """`count` captions for each image of `grid`, drawn from the model's own distribution at `temperature`; the same seed draws the same
    ones."""
    b = len(grid)
    generator = torch.Generator(device=grid.device).manual_seed(seed)
    past = model.prefill(grid)
    tokens = torch.full((b * count, 1), special.start, device=grid.device)
    logprob = torch.zeros(b * count, device=grid.device)
    done = torch.zeros(b * count, dtype=torch.bool, device=grid.device)
    never = torch.tensor(special.never, dtype=torch.long, device=grid.device)
    for position in range(max_tokens):
        logits, past = model.step(tokens[:, -1:], position, past)
        logs = (logits.float().index_fill_(1, never, -torch.inf) / temperature).log_softmax(-1)
        piece = torch.multinomial(logs.exp(), 1, generator=generator)
        logprob += torch.where(done, 0.0, logs.gather(1, piece).squeeze(1))
        tokens = torch.cat([tokens, torch.where(done.unsqueeze(1), special.end, piece)], 1)
        done |= piece.squeeze(1) == special.end
        if done.all():
            break
    drawn = []
    for row, total in zip(tokens[:, 1:].tolist(), logprob.tolist(), strict=True):
        stop = row.index(special.end) if special.end in row else len(row)
        drawn.append(Hypothesis(total / min(stop + 1, len(row)), total, tuple(row[:stop])))
    return [drawn[i * count : (i + 1) * count] for i in range(b)]
