"""Caption metrics as coco-caption computes them, without Java: CIDEr-D, BLEU-1 to 4, ROUGE-L, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from compress.metrics.bleu import bleu
from compress.metrics.bootstrap import Paired, mean_ci, paired
from compress.metrics.cider import CiderD
from compress.metrics.rouge import rouge_l
from compress.ptb import ptb_tokenize

__all__ = ["CiderD", "Paired", "Scores", "bleu", "mean_ci", "paired", "ptb_tokenize", "rouge_l", "score"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a set of captions, all times 100; `per_image` is CIDEr-D per image, float64 (images,)."""

    cider: float
    cider_ci95: tuple[float, float]
    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    rouge_l: float
    images: int
    per_image: np.ndarray

    def row(self) -> dict[str, float | int | list[float]]:
        """The numbers for JSON: all but `per_image`."""
        row = asdict(self)
        del row["per_image"]
        return row | {"cider_ci95": list(self.cider_ci95)}


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score one caption per image against its references; raw texts.

    Document frequencies are those of these references, and the interval is over images. Raises DataError for no captions, a
    different number of candidates and references, or an image without references.
    """
    from compress.errors import DataError

    if not len(candidates):
        raise DataError("there are no captions to score")
    if len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions cannot be scored against the references of {len(references)} images")
    for index, captions in enumerate(references):
        if isinstance(captions, str):
            raise DataError(f"the references of image {index} are one text, not a list of captions")
        if not len(captions):
            raise DataError(f"image {index} has no reference captions to score against")
    ours = [ptb_tokenize(caption) for caption in candidates]
    theirs = [[ptb_tokenize(caption) for caption in captions] for captions in references]
    per_image = CiderD(theirs).score(ours) * 100
    precisions = [value * 100 for value in bleu(ours, theirs)]
    rouge = float(rouge_l(ours, theirs).mean() * 100)
    return Scores(float(per_image.mean()), mean_ci(per_image), *precisions, rouge, len(ours), per_image)
