"""Rounding to the packed formats, read back by an independent reader."""

from __future__ import annotations

import numpy as np
import pytest

from packed_layouts import (
    pack,
    pack_neurons,
    pack_planes,
    pack_records,
    unpack_neurons,
    unpack_planes,
    unpack_q4,
    unpack_q8,
    unpack_records,
)

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
    for read in (unpack_q8(pack("q8", w)), unpack_planes(*pack_planes(w)), unpack_neurons(pack_neurons(w))):
        assert np.all(np.abs(read[:, :columns] - w) <= limit)
        assert not read[:, columns:].any()


def test_all_int8_forms_hold_the_same_numbers() -> None:
    w = weights(7, 700)
    expected = unpack_q8(pack("q8", w))
    assert np.array_equal(unpack_planes(*pack_planes(w)), expected)
    assert np.array_equal(unpack_neurons(pack_neurons(w)), expected)


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


def test_extreme_outlier_keeps_its_value() -> None:
    w = weights(1, 256)
    w[0, 17] = 30.0
    assert unpack_q8(pack("q8", w))[0, 17] == pytest.approx(30.0, rel=1e-3)
    assert unpack_q4(pack("q4", w))[0, 17] == pytest.approx(30.0, rel=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = weights(2, 64)
    w[1, 3] = bad
    makers = (lambda: pack("q8", w), lambda: pack("q4", w), lambda: pack_records(w))
    for make in (*makers, lambda: pack_planes(w), lambda: pack_neurons(w)):
        with pytest.raises(ValueError, match="not finite"):
            make()
