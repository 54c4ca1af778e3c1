"""BLEU-1 to BLEU-4 of a corpus (Papineni et al., ACL 2002) as coco-caption computes it.

Counts are summed over the corpus; the brevity penalty compares the candidates' total length with the sum of each candidate's
closest reference length (of two equally close ones the shorter). coco-caption's tiny constants are kept, so that an n-gram order
without a match gives a number near zero instead of an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from compress.metrics.cider import Caption, tokens

SMALL, TINY = 1e-9, 1e-15


def bleu(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], n: int = 4) -> list[float]:
    """[BLEU-1, ..., BLEU-n] in 0..1 of candidate i against the captions `references[i]`; texts or lists of tokens.

    Raises ValueError for no candidates, a different number of candidates and references, or an image without references.
    """
    if not len(candidates) or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for the references of {len(references)} images")
    length, closest = 0, 0
    correct, guessed = [0] * n, [0] * n
    for candidate, captions in zip(candidates, references, strict=True):
        words = tokens(candidate)
        tokenized = [tokens(caption) for caption in captions]
        if not tokenized:
            raise ValueError("an image has no reference captions")
        length += len(words)
        closest += min((abs(len(caption) - len(words)), len(caption)) for caption in tokenized)[1]
        for order in range(1, n + 1):
            grams = Counter(_ngrams(words, order))
            guessed[order - 1] += max(0, len(words) - order + 1)
            if not grams:
                continue
            most: dict[tuple[str, ...], int] = {}
            for caption in tokenized:
                for gram, count in Counter(gram for gram in _ngrams(caption, order) if gram in grams).items():
                    if count > most.get(gram, 0):
                        most[gram] = count
            correct[order - 1] += sum(min(count, grams[gram]) for gram, count in most.items())
    product, scores = 1.0, []
    ratio = (length + TINY) / (closest + SMALL)
    for order in range(n):
        product *= (correct[order] + TINY) / (guessed[order] + SMALL)
        scores.append(product ** (1 / (order + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
    return scores


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))
