"""Sketches of float rows: their bounds hold for whatever rows and inputs, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_layouts import ISAS, bfloat16, from_bfloat16, padded
from persimmon.fast.cpu import _native

Numbers = np.ndarray


def stored(rows: Numbers, kind: str) -> tuple[Numbers, Numbers]:
    """Rows as a model stores them, and what they then are as floats."""
    if kind == "float32":
        return padded(rows).view(np.uint8), rows
    return bfloat16(padded(rows)).view(np.uint8), from_bfloat16(bfloat16(rows))


def product(weights: Numbers, kind: str, x: Numbers, isa: str) -> Numbers:
    """What the kernels compute without a sketch."""
    products: Numbers = _native.rows(kind, weights, None, x[None], isa=isa)[0]
    return products


def check(rows: Numbers, center: Numbers, x: Numbers, kind: str, bits: int | None = None) -> tuple[Numbers, Numbers]:
    """Estimates and bounds, the same on every instruction set; no product is above its bound, where there is one.

    Without `bits` of both kinds of codes, and those of the finer come back.
    """
    if bits is None:
        check(rows, center, x, kind, 5)
        return check(rows, center, x, kind, 8)
    weights, floats = stored(rows, kind)
    exact = floats.astype(np.float64) @ x.astype(np.float64)
    first = _native.sketched_rows(kind, weights, center, x, ISAS[0], bits)
    for isa in ISAS:
        estimate, bound = _native.sketched_rows(kind, weights, center, x, isa, bits)
        assert np.array_equal(estimate, first[0], equal_nan=True) and np.array_equal(bound, first[1], equal_nan=True), (
            isa
        )
        assert not np.any(bound < exact) and not np.any(bound < product(weights, kind, x, isa)), isa
        assert not np.any(bound < estimate), isa
    return estimate, bound


def random_case(seed: int, count: int, inputs: int) -> tuple[Numbers, Numbers, Numbers]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, inputs), np.float32)
    center = 3 * rng.standard_normal(inputs, np.float32)
    return rows, center, center + rng.standard_normal(inputs, np.float32)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "close"), [(8, 0.02), (5, 0.15)])
@pytest.mark.parametrize(("count", "inputs"), [(1, 1), (16, 256), (17, 40), (100, 300), (33, 2048)])
def test_bounds_are_close(kind: str, count: int, inputs: int, bits: int, close: float) -> None:
    rows, center, x = random_case(0, count, inputs)
    estimate, bound = check(rows, center, x, kind, bits)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(x - center)
    exact = stored(rows, kind)[1].astype(np.float64) @ x
    assert np.all(np.abs(estimate - exact) < close * lengths)
    assert np.all(bound - exact < 1.5 * close * lengths + 1e-3)


UNEVEN: dict[str, Callable[[Numbers, Numbers, Numbers], object]] = {
    "a large input": lambda rows, center, x: x.__setitem__(3, 1e4),
    "a large weight": lambda rows, center, x: rows.__setitem__((slice(None), 5), 1e4),
    "a token that is the center": lambda rows, center, x: x.__setitem__(slice(None), center),
    "no input": lambda rows, center, x: [x.fill(0), center.fill(0)],
    "no weight": lambda rows, center, x: rows.fill(0),
    "tiny weights": lambda rows, center, x: rows.__imul__(1e-38),
    "tiny inputs": lambda rows, center, x: [x.__imul__(1e-38), center.fill(0)],
    "huge weights": lambda rows, center, x: rows.__imul__(1e30),
    "huge products of a center": lambda rows, center, x: [rows.fill(-1e36), center.fill(1000), x.fill(0)],
    "sums that overflow on the way": lambda rows, center, x: [
        rows.__setitem__((slice(None), slice(0, None, 2)), 1e38),
        rows.__setitem__((slice(None), slice(1, None, 2)), -1.02e38),
    ],
    "weights that AMX takes for zero": lambda rows, center, x: [rows.fill(-1.1e-38), x.__imul__(1e15)],
    "a far center": lambda rows, center, x: center.fill(1e6),
    "rows that are the inputs": lambda rows, center, x: rows.__setitem__(slice(None), x),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", UNEVEN)
def test_bounds_of_uneven_numbers_hold(name: str, kind: str) -> None:
    rows, center, x = random_case(1, 40, 130)
    UNEVEN[name](rows, center, x)
    check(rows, center, x, kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [-38, -30, -24, -21, -19, -18, -16, -14, -12, 12, 14, 16, 18, 25, 30])
def test_bounds_hold_where_float32_ends(exponent: int, kind: str) -> None:
    rows, center, x = random_case(3, 60, 300)
    scale = np.float32(10.0**exponent)
    check(rows, 0 * center, x * scale, kind)
    check(rows * scale, center, x, kind)
    check(rows * np.float32(10.0 ** min(0, exponent + 8)), 0 * center, x * scale, kind)
    _, held = check(rows, center, x, kind)
    assert np.all(np.isfinite(held))
    signs = np.where(np.arange(300) % 2, 1, -1).astype(np.float32)  # the loss of the inputs may all go one way
    check(np.tile(signs, (60, 1)), 0 * center, x * scale, kind)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e20, 1e-20])
def test_rows_without_a_sketch_are_never_left_out(value: float) -> None:
    rows, center, x = random_case(2, 20, 64)
    rows[7] = value
    for isa in ISAS:
        _, bound = _native.sketched_rows("float32", stored(rows, "float32")[0], center, x, isa)
        assert np.isnan(bound[7]) and np.all(np.isfinite(np.delete(bound, 7)))


def test_only_single_tokens_and_float_rows_have_sketches() -> None:
    rows, center, x = random_case(4, 16, 64)
    with pytest.raises(ValueError, match="only float rows"):
        _native.sketched_rows("q8", stored(rows, "float32")[0], center, x)
    with pytest.raises(ValueError, match="do not fit"):
        _native.sketched_rows("float32", rows.view(np.uint8)[:, :100].copy(), center, x)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 600), st.floats(-3, 3),
    st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_bounds_hold(seed: int, count: int, inputs: int, spread: float, kind: str) -> None:
    rows, center, x = random_case(seed, count, inputs)
    rng = np.random.default_rng(seed)
    # From even numbers to a few that are nearly all there is.
    x *= np.exp(spread * rng.standard_normal(inputs)).astype(np.float32)
    rows *= np.exp(spread * rng.standard_normal((count, inputs))).astype(np.float32)
    check(rows, center, x, kind)
