"""Estimates against exact values and simulation."""

import math
from itertools import combinations

import numpy as np
import pytest

from persimmon.evals.statistics import estimate, paired_difference, pass_at_k, unpaired_interval


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 3, 4), (6, 6, 2), (7, 1, 7)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_mean_and_error_of_shares() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = estimate(values)
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 10)
    assert found.low == pytest.approx(0.21, abs=0.02) and found.high == pytest.approx(0.39, abs=0.02)
    assert estimate(values) == found


def test_weighted_mean() -> None:
    assert estimate([1.0, 3.0], [3.0, 1.0]).value == pytest.approx(1.5)
    assert math.isnan(estimate([]).value)
    assert math.isnan(estimate([1.0], [0.0]).value)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = estimate((generator.random(150) < 0.4).astype(float).tolist())
        hits += found.low <= 0.4 <= found.high
    assert 180 <= hits <= 199


def test_paired_differences() -> None:
    generator = np.random.default_rng(1)
    base = (generator.random(400) < 0.5).astype(float)
    better = np.maximum(base, generator.random(400) < 0.2)
    found = paired_difference(better.tolist(), base.tolist())
    assert found.low > 0 and found.p_value < 0.01 and found.num_questions == 400
    same = paired_difference(base.tolist(), base.tolist())
    assert (same.value, same.p_value) == (0.0, 1.0)
    shuffled = paired_difference(base.tolist(), generator.permutation(base).tolist())
    assert shuffled.p_value > 0.05


def test_a_weighted_difference_is_that_of_the_weighted_means() -> None:
    first, second, weights = [1.0, 2.0, 4.0], [1.5, 2.0, 3.0], [10.0, 1.0, 2.0]
    found = paired_difference(first, second, weights)
    expected = estimate(first, weights).value - estimate(second, weights).value
    assert found.value == pytest.approx(expected) and expected < 0
    assert paired_difference(first, second).value > 0, "the plain mean has the other sign"
    assert found.low <= found.value <= found.high
    assert paired_difference(first, second, [3.0] * 3) == paired_difference(first, second)


def test_unpaired_interval() -> None:
    assert unpaired_interval(40.0, 1.0, 38.0) == pytest.approx((0.04, 3.96), abs=0.001)
