from __future__ import annotations

import pytest

from persimmon.bench import timing
from persimmon.bench.timing import Pairs, Stopwatch, Summary, alternate, percent_of, percentile, repeat
from persimmon.errors import InputError


class FakeClock:
    """A clock that moves when work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_both_sides_take_turns_and_ours_begins() -> None:
    order: list[str] = []

    def side(name: str, rates: list[float]) -> timing.Callable[[], float]:
        def run() -> float:
            order.append(name)
            return rates.pop(0)

        return run

    pairs = alternate(side("ours", [10.0, 12.0, 8.0]), side("peer", [5.0, 4.0, 4.0]), 3)
    assert order == ["ours", "peer"] * 3
    assert pairs.ours.values == (10.0, 12.0, 8.0) and pairs.peer.values == (5.0, 4.0, 4.0)
    assert pairs.ratios.values == (2.0, 3.0, 2.0)


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    # The machine halves its speed after the first pair: every pair says 2, whatever the medians say.
    pairs = Pairs(Summary((20.0, 10.0, 10.0, 4.0)), Summary((10.0, 5.0, 5.0, 2.0)))
    assert (pairs.ratios.median, pairs.ratios.low, pairs.ratios.high) == (2.0, 2.0, 2.0)


def test_seconds_and_percent_on_a_fake_clock() -> None:
    clock = FakeClock()

    def run() -> float:
        with Stopwatch(clock) as watch:
            clock.now += 0.25 * (1 + clock.now)  # every run is slower than the one before
        return 8 / watch.seconds  # tokens per second

    summary = repeat(run, 3)
    assert summary.values == pytest.approx((32.0, 25.6, 20.48))
    assert summary.median == pytest.approx(25.6)
    assert percent_of(summary.median, 51.2) == pytest.approx(50.0)


def test_summaries_name_their_spread() -> None:
    assert Summary((1.0, 3.0, 2.0)).describe("tokens/s") == "2 tokens/s (1-3, n=3)"
    with pytest.raises(InputError, match="one measurement or more"):
        Summary(())
    with pytest.raises(InputError, match="ceiling must be positive"):
        percent_of(1.0, 0.0)


def test_percentiles_take_a_value_that_was_measured() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert percentile(values, 0.5) == 51.0 and percentile(values, 0.95) == 96.0
    assert percentile([7.0], 0.95) == 7.0
    with pytest.raises(InputError, match="one value or more"):
        percentile([], 0.5)
