"""Summaries of repeated measurements, and two sides measured in alternation. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from persimmon.errors import InputError

Clock = Callable[[], float]
"""Seconds from any origin; a parameter, so that tests bring their own."""

clock: Clock = time.perf_counter


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("a summary needs one measurement or more")

    @property
    def median(self) -> float:
        """The one in the middle."""
        return float(median(self.values))

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def describe(self, unit: str) -> str:
        """`6.52 tokens/s (6.31-6.60, n=5)`."""
        return f"{self.median:,.4g} {unit} ({self.low:,.4g}-{self.high:,.4g}, n={len(self.values)})"


@dataclass(frozen=True)
class Pairs:
    """Two sides measured in turns: ours, the peer, ours, the peer ..."""

    ours: Summary
    peer: Summary

    @property
    def ratios(self) -> Summary:
        """Ours over the peer's, pair by pair: neighbours in time saw the same machine."""
        return Summary(tuple(a / b for a, b in zip(self.ours.values, self.peer.values, strict=True)))


def repeat(measure: Callable[[], float], runs: int) -> Summary:
    """One side alone, `runs` times."""
    return Summary(tuple(measure() for _ in range(runs)))


def alternate(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> Pairs:
    """Measure both sides in turns, ours first in every pair."""
    done = [(ours(), peer()) for _ in range(pairs)]
    return Pairs(Summary(tuple(a for a, _ in done)), Summary(tuple(b for _, b in done)))


def percent_of(achieved: float, ceiling: float) -> float:
    """Percent of a ceiling; above 100 when the ceiling's measurement caught a slower moment than the run did."""
    if ceiling <= 0:
        raise InputError(f"a ceiling must be positive, got {ceiling}")
    return 100 * achieved / ceiling


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie: nearest rank, no interpolation."""
    if not values:
        raise InputError("a percentile needs one value or more")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Stopwatch:
    """Seconds of a block: `with Stopwatch() as watch: ...; watch.seconds`."""

    def __init__(self, now: Clock | None = None) -> None:
        self._now = now or clock
        self._started = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._now() - self._started
