"""Confidence intervals and paired tests by resampling images (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

The values are one number per image, for example its CIDEr-D with the document frequencies of the whole split, which are not
resampled. Means of resamples are computed in blocks, so memory stays at a few megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 20  # values drawn at once


@dataclass(frozen=True)
class Paired:
    """The mean difference, its 95% interval and a two-sided p-value."""

    delta: float
    ci95: tuple[float, float]
    p_value: float


def mean_ci(values: np.ndarray, resamples: int = 10000, seed: int = 17, level: float = 0.95) -> tuple[float, float]:
    """(low, high): the percentile interval of the mean of `values` (images,) in their unit. Raises ValueError for no values."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled_means(values, resamples, seed), [tail, 1 - tail])
    return float(low), float(high)


def paired(a: npt.ArrayLike, b: npt.ArrayLike, resamples: int = 10000, seed: int = 17) -> Paired:
    """How much higher the mean of `a` is than that of `b`, both (images,) over the same images in the same order.

    The p-value is the share of resampled mean differences, shifted to a mean of zero, that are at least as far from zero as the
    observed one; it is never below 1 / (resamples + 1), nor below 2 ** (1 - images), the least that a test of so few images can say (all
    signs alike, by chance). Raises ValueError for different shapes or no values.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values of {a.size} and {b.size} images")
    delta = float(np.mean(a - b)) if a.size else 0.0
    means = resampled_means(a - b, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    # The tolerance keeps rounding from deciding where all differences are equal.
    extreme = np.count_nonzero(np.abs(means - delta) >= abs(delta) - 1e-12 * max(1.0, abs(delta)))
    return Paired(delta, (float(low), float(high)), max((1 + extreme) / (resamples + 1), 2.0 ** (1 - a.size)))


def resampled_means(values: np.ndarray, resamples: int = 10000, seed: int = 17) -> np.ndarray:
    """Means of `resamples` samples with replacement of `values` (images,): float64 (resamples,)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or resamples < 1:
        raise ValueError("the bootstrap needs a value for at least one image and at least one resample")
    draws = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(values))
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = draws.integers(0, len(values), size=(count, len(values)), dtype=np.int32)
        means[start : start + count] = values[drawn].mean(1)
    return means
