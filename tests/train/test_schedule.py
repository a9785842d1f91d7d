"""Learning-rate schedules as functions of progress: range, direction, continuity, ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.errors import ConfigError
from persimmon.train.schedule import cosine, warmup_stable_decay

Schedule = Callable[[float], float]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, float, float, float]:
    """(schedule, warm-up, first progress of the fall, floor)."""
    # Shares below a millionth would be steeper than the steps taken here.
    warmup = draw(st.just(0.0) | st.floats(1e-6, 0.9))
    floor = draw(st.floats(0.0, 1.0))
    if draw(st.booleans()):
        return lambda p: cosine(p, warmup=warmup, floor=floor), warmup, warmup, floor
    decay = draw(st.just(0.0) | st.floats(1e-6, 1.0 - warmup))
    return lambda p: warmup_stable_decay(p, warmup=warmup, decay=decay, floor=floor), warmup, 1.0 - decay, floor


progress = st.floats(0.0, 1.0)


@given(schedule=schedules(), at=progress)
def test_range(schedule: tuple[Schedule, float, float, float], at: float) -> None:
    function, warmup, _, floor = schedule
    value = function(at)
    assert 0.0 <= value <= 1.0 + 1e-12
    assert value >= floor - 1e-12 or at < warmup


@given(schedule=schedules(), a=progress, b=progress)
def test_rises_then_never_rises(schedule: tuple[Schedule, float, float, float], a: float, b: float) -> None:
    function, warmup, fall, _ = schedule
    a, b = min(a, b), max(a, b)
    if b < warmup:
        assert function(a) <= function(b)
    if a >= warmup:
        assert function(a) >= function(b) - 1e-12
    if warmup <= a and b <= fall:
        assert function(a) == pytest.approx(function(b), abs=1e-12) == 1.0


@given(schedule=schedules(), at=progress)
def test_has_no_jumps(schedule: tuple[Schedule, float, float, float], at: float) -> None:
    function, *_ = schedule
    assert abs(function(min(1.0, at + 1e-12)) - function(at)) < 1e-5


@given(schedule=schedules())
def test_ends(schedule: tuple[Schedule, float, float, float]) -> None:
    function, warmup, fall, floor = schedule
    assert function(warmup) == pytest.approx(1.0)
    assert function(1.0) == pytest.approx(floor if fall < 1.0 else 1.0)
    # The first step of a warm-up is small and not lost.
    assert 0.0 < function(0.0) <= (0.001 if warmup else 1.0)


def test_known_points() -> None:
    settings = {"warmup": 0.1, "decay": 0.5, "floor": 0.2}
    assert [warmup_stable_decay(p, **settings) for p in (0.1, 0.3, 0.5)] == [1.0, 1.0, 1.0]
    assert warmup_stable_decay(0.75, **settings) == pytest.approx(0.6)
    assert cosine(0.55, warmup=0.1, floor=0.2) == pytest.approx(0.6)
    assert cosine(1.0, warmup=1.0) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 0.6, "decay": 0.5}, "add up to at most 1"),
        ({"warmup": -0.1, "decay": 0.5}, "warmup -0.1"),
        ({"warmup": 0.1, "decay": float("nan")}, "decay nan"),
        ({"warmup": 0.1, "decay": 0.5, "floor": 1.5}, r"floor must be in \[0, 1\], got 1.5"),
    ],
)
def test_shares_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        warmup_stable_decay(0.5, **settings)
