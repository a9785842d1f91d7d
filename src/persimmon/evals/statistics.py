"""Pass@k, bootstrap confidence intervals and paired differences. Plain numpy; the same numbers on every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
_SEED = 20230907  # any fixed number; the day of the release
_CHUNK = 1 << 22  # resampled indices held at once


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Written as a product, as in Chen et al. 2021 (arXiv 2107.03374), section 2.1, where the quotient would overflow.
    """
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(num_samples - num_right + 1, num_samples + 1))


@dataclass(frozen=True)
class Estimate:
    """A weighted mean over questions with its uncertainty."""

    value: float
    stderr: float
    """Standard error: sample standard deviation of the questions / sqrt(n), as lm-eval gives for a mean."""

    low: float
    high: float
    """Ends of the 95 % bootstrap percentile interval over questions."""


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Mean of `values`, or sum(w * v) / sum(w), with interval. NaN throughout for no values."""
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(v) == 0 or w.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    mean = float((v * w).sum() / w.sum())
    # Linearized error of the ratio sum(w * v) / sum(w); for equal weights the usual one.
    residuals = (v - mean) * w / w.mean()
    stderr = float(np.sqrt((residuals**2).sum() / max(1, len(v) - 1) / len(v)))
    means = _resampled_means(v, w)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, stderr, float(low), float(high))


def _resampled_means(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of RESAMPLES samples drawn with replacement."""
    generator = np.random.default_rng(_SEED)
    per_chunk = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, RESAMPLES, per_chunk):
        rows = min(per_chunk, RESAMPLES - start)
        index = generator.integers(0, len(values), (rows, len(values)))
        totals = weights[index].sum(1)
        means.append((values * weights)[index].sum(1) / np.where(totals == 0, 1, totals))
    return np.concatenate(means)


@dataclass(frozen=True)
class Difference:
    """How much better one run did than another on the same questions."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided: a sign-flip test of the paired differences."""

    num_questions: int


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Difference:
    """Mean of first - second over the same questions, with a bootstrap interval and a sign-flip test.

    With `weights` the mean is weighted as the scores are, so that it is the difference of the two scores.
    """
    delta = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    result = estimate(delta.tolist(), weights)
    generator = np.random.default_rng(_SEED)
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        delta = delta * w / w.mean()
    changed = np.abs(delta[delta != 0])
    if len(changed) == 0:
        return Difference(result.value, result.low, result.high, 1.0, len(delta))
    observed = abs(delta.sum())
    extreme, drawn = 0, 0
    while drawn < RESAMPLES:
        rows = min(RESAMPLES - drawn, max(1, _CHUNK // len(changed)))
        signs = generator.choice(np.array([-1.0, 1.0]), (rows, len(changed)))
        # The tolerance keeps sums that are equal but for rounding on the safe side.
        extreme += int((np.abs(signs @ changed) >= observed - 1e-9).sum())
        drawn += rows
    return Difference(result.value, result.low, result.high, (extreme + 1) / (drawn + 1), len(delta))


def unpaired_interval(value: float, stderr: float, published: float) -> tuple[float, float]:
    """Interval of value - published, where only our own uncertainty is known (normal approximation)."""
    half = 1.959964 * stderr
    return value - published - half, value - published + half
