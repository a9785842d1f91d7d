"""Rounding to the packed formats, read back by an independent reader."""

from __future__ import annotations

import numpy as np
import pytest

from packed_layouts import (
    pack,
    pack_neurons,
    pack_planes,
    pack_records,
    read_planes,
    round_planes,
    same_planes,
    superblocks,
    top_bytes,
    unpack_neurons,
    unpack_planes,
    unpack_q4,
    unpack_q8,
    unpack_records,
)
from persimmon.fast.cpu import _native

RNG = np.random.default_rng(0)


def weights(rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((rows, columns), dtype=np.float32) * 0.02


def group_steps(w: np.ndarray, levels: float) -> np.ndarray:
    """Largest magnitude of every group of 32 / levels, for every weight."""
    columns = w.shape[1]
    grouped = np.pad(w, ((0, 0), (0, -columns % 32))).reshape(w.shape[0], -1, 32)
    return np.repeat(np.abs(grouped).max(-1) / levels, 32, axis=1)[:, :columns]


@pytest.mark.parametrize("columns", [1, 31, 256, 300, 1024])
def test_int8_is_the_nearest_code(columns: int) -> None:
    w = weights(5, columns)
    # Half a step, and the float16 rounding of the scale (2^-11) over up to 127 steps.
    limit = group_steps(w, 127) * (0.5 + 127 / 2048)
    for read in (unpack_q8(pack("q8", w)), unpack_neurons(pack_neurons(w))):
        assert np.all(np.abs(read[:, :columns] - w) <= limit)
        assert not read[:, columns:].any()


@pytest.mark.parametrize("columns", [1, 31, 256, 300, 1024])
def test_int8_in_planes_is_the_nearest_code(columns: int) -> None:
    """A group's step is rounded up to a multiple of the row's unit, of which the largest has 128 at least."""
    w = weights(5, columns)
    steps = group_steps(w, 127)
    read = unpack_planes(*pack_planes(w))
    assert np.all(np.abs(read[:, :columns] - w) <= 0.5001 * (steps + steps.max(1, keepdims=True) / 127))
    assert not read[:, columns:].any()


def planes_case(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows from a trillionth to thousands, groups of zeros, a row of zeros, ties between two codes; and a center."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns), np.float32) * 10.0 ** rng.uniform(-12, 4.5, (rows, 1))
    w *= np.repeat(10.0 ** rng.uniform(-4, 0, (rows, -(-columns // 32))), 32, axis=1)[:, :columns]
    w[:, rng.integers(0, columns, columns // 10)] = 0.0
    w[:, 32:64] = 0.0
    w[rows // 2] = 0.0
    w[rows // 3] = np.resize(np.float32([127, 0.5, 1.5, -2.5, -127, 126.5]), columns)
    return w.astype(np.float32), rng.standard_normal(columns, np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (9, 31), (40, 256), (33, 300), (12, 1024), (7, 4096), (5, 4100)])
def test_planes_are_rounded_as_the_layout_says(rows: int, columns: int) -> None:
    """Every code, scale, shift and error against another implementation."""
    for seed in range(4):
        w, center = planes_case(rows, columns, seed)
        top, rest = pack_planes(w, center)
        assert top.shape[1] % 64 == 0
        same_planes(read_planes(top, rest), round_planes(w, center))


def test_the_top_two_bits_err_by_what_their_row_says() -> None:
    """Inputs around the center: the products of what is left out are the shift, give or take the error."""
    rng = np.random.default_rng(8)
    w, center = weights(400, 1024), rng.standard_normal(1024, np.float32) * 3
    read = read_planes(*pack_planes(w, center))
    x = (center + rng.standard_normal((20, 1024))).astype(np.float64)
    left_out = x @ (read.floats - read.coarse)[:, :1024].T.astype(np.float64)
    deviation = read.error * np.linalg.norm(x - center, axis=1)[:, None]
    found = (left_out - read.shift) / deviation
    assert abs(found.mean()) < 0.05 and abs(found.std() - 1) < 0.05 and np.abs(found).max() < 5.5
    assert (left_out / deviation).std() > 2.5  # without the shift


def test_planes_are_packed_into_the_beginning_of_longer_rows() -> None:
    """As p44's cold records are; what lies behind is left alone, and so is a center that is not there."""
    w, center = planes_case(11, 300, 1)
    top, rest = pack_planes(w, center)
    longer = [np.full((11, size), 7, np.uint8) for size in (top_bytes(300) + 64, 192 * superblocks(300) + 544)]
    _native.pack_planes(w, center, None, *longer, 2)
    for found, expected in zip(longer, (top, rest), strict=True):
        width = expected.shape[1]
        assert np.array_equal(found[:, :width], expected) and (found[:, width:] == 7).all()
    assert not read_planes(*pack_planes(w)).shift.any()


@pytest.mark.parametrize(
    ("center", "top", "rest"), [(299, 192, 384), (301, 192, 384), (300, 191, 384), (300, 192, 383)]
)
def test_planes_of_wrong_sizes_are_refused(center: int, top: int, rest: int) -> None:
    rows = [np.zeros((2, size), np.uint8) for size in (top, rest)]
    with pytest.raises(ValueError, match=r"the center has the wrong size|output has the wrong shape"):
        _native.pack_planes(weights(2, 300), np.zeros(center, np.float32), None, *rows, 1)


def test_all_int8_forms_with_float16_scales_hold_the_same_numbers() -> None:
    w = weights(7, 700)
    assert np.array_equal(unpack_neurons(pack_neurons(w)), unpack_q8(pack("q8", w)))


def test_int4_beats_the_obvious_scale() -> None:
    w = weights(64, 1024)
    grouped = w.reshape(64, -1, 32)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
    scale = (-extreme / 8).astype(np.float16).astype(np.float32)
    obvious = (np.clip(np.rint(grouped / scale), -8, 7) * scale).reshape(w.shape)
    searched = unpack_q4(pack("q4", w))
    assert ((searched - w) ** 2).sum() < 0.9 * ((obvious - w) ** 2).sum()


def test_int4_importance_lowers_the_weighted_error() -> None:
    w = weights(32, 512)
    importance = RNG.uniform(0.0, 1.0, 512).astype(np.float32) ** 4
    plain, weighted = unpack_q4(pack("q4", w)), unpack_q4(pack("q4", w, importance))
    assert (importance * (weighted - w) ** 2).sum() < (importance * (plain - w) ** 2).sum()


@pytest.mark.parametrize(("outputs", "neurons"), [(1, 1), (70, 40), (256, 32), (300, 300), (640, 97)])
def test_records_hold_the_numbers_of_rows(outputs: int, neurons: int) -> None:
    """A q4 down projection, neuron-major: the same codes and scales, however its outputs are cut into calls."""
    w = weights(outputs, neurons)
    records = pack_records(w)
    read = unpack_records(records)
    assert np.array_equal(read[:neurons, :outputs].T, unpack_q4(pack("q4", w))[:, :neurons])
    assert not read[neurons:].any() and not read[:, outputs:].any()
    assert np.array_equal(pack_records(w, slices=3), records)


@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_zeros_and_tiny_weights_become_zeros(kind: str) -> None:
    w = np.zeros((2, 256), np.float32)
    w[1] = 1e-12
    assert not (unpack_q8 if kind == "q8" else unpack_q4)(pack(kind, w)).any()
    assert not unpack_planes(*pack_planes(w)).any()


def test_extreme_outlier_keeps_its_value() -> None:
    w = weights(1, 256)
    w[0, 17] = 30.0
    assert unpack_q8(pack("q8", w))[0, 17] == pytest.approx(30.0, rel=1e-3)
    assert unpack_planes(*pack_planes(w))[0, 17] == pytest.approx(30.0, rel=1e-2)
    assert unpack_q4(pack("q4", w))[0, 17] == pytest.approx(30.0, rel=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = weights(2, 64)
    w[1, 3] = bad
    makers = (lambda: pack("q8", w), lambda: pack("q4", w), lambda: pack_records(w))
    for make in (*makers, lambda: pack_planes(w), lambda: pack_neurons(w)):
        with pytest.raises(ValueError, match="not finite"):
            make()
