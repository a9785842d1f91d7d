from __future__ import annotations

import pytest

from persimmon.bench import ceiling, limits
from persimmon.bench.limits import Limit, best, matrix_rate, measure, merge, read_bandwidth
from persimmon.errors import UnavailableError


def test_the_best_way_counts_and_the_others_are_kept() -> None:
    limit = best({"a": [1.0, 2.0, 9.0], "b": [3.0, 3.0, 3.0]})
    assert (limit.value, limit.method, limit.samples, limit.others) == (3.0, "b", (3.0, 3.0, 3.0), {"a": 2.0})


def test_before_and_after_are_one_measurement() -> None:
    before, after = Limit(4.0, "a", (4.0, 4.0, 5.0), {}), Limit(2.0, "a", (1.0, 2.0, 2.0), {})
    assert merge(before, after) == Limit(3.0, "a", (4.0, 4.0, 5.0, 1.0, 2.0, 2.0), {})
    assert merge(before, Limit(9.0, "b", (9.0,), {})).value == 9.0


def test_reading_and_multiplying_have_a_rate() -> None:
    assert read_bandwidth(1, 1 << 20).value > 0
    rate = matrix_rate(1, size=32)
    assert rate.value > 0 and {rate.method, *rate.others} >= {"float32"}


def test_limits_are_measured_in_a_process_of_their_own() -> None:
    limit = measure("read", 1, 1 << 20)
    assert limit.value > 0 and len(limit.samples) == 7


def test_a_failed_measurement_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.sys, "executable", "/bin/false")
    with pytest.raises(UnavailableError, match="could not be measured"):
        measure("gemm", 1)


def test_at_least_a_gibibyte_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((1 << 20, 1 << 30), (1 << 40, 2 << 30), (None, 1 << 30)):
        monkeypatch.setattr(limits, "memory_available", lambda free=free: free)
        assert limits.default_read_bytes() == expected


def test_a_ceiling_is_named_before_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [10.0, 30.0]
    monkeypatch.setattr(ceiling, "measure", lambda *_: Limit(values[0], "sum", (values.pop(0),), {"dot": 7.0}))
    found = ceiling.Ceiling("read", 2)
    assert found.describe() == "ceiling: 10.0 GB/s read by 2 threads (sum, dot 7.0)"
    assert found.again().value == 20.0
