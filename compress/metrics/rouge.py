"""ROUGE-L (Lin, ACL 2004 workshop) as coco-caption computes it: beta 1.2, the best precision and the best recall over the references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.metrics.cider import Caption, tokens

BETA = 1.2


def rouge_l(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> np.ndarray:
    """ROUGE-L in 0..1 of candidate i against the captions `references[i]`, float64 (candidates,); texts or lists of tokens.

    A caption without tokens counts as one empty token, as in coco-caption. Raises ValueError for a different number of
    candidates and references, or an image without references.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for the references of {len(references)} images")
    return np.array([_score(candidate, captions) for candidate, captions in zip(candidates, references, strict=True)], dtype=np.float64)


def _score(candidate: Caption, captions: Sequence[Caption]) -> float:
    if not len(captions):
        raise ValueError("an image has no reference captions")
    words = tokens(candidate) or [""]
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    precision = recall = 0.0
    for caption in captions:
        reference = tokens(caption) or [""]
        common = _lcs(places, len(words), reference)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(reference))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _lcs(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one integer (Hyyrö 2004).

    `places` maps each word of the first sequence to the bits of its positions.
    """
    full = (1 << length) - 1
    row = full
    for word in other:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return length - row.bit_count()
