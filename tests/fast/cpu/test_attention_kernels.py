"""Attention over both kinds of cache against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from packed_layouts import ISAS
from persimmon.fast.cpu import _native


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query [D] against all keys."""
    q, k, v = (torch.from_numpy(x).double()[None, None] for x in (q[None], k, v))
    return F.scaled_dot_product_attention(q, k, v)[0, 0, 0].numpy()


def native_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    int8: bool,
    isa: str,
    *,
    table: list[int] | None = None,
    block: int = 64,
) -> np.ndarray:
    """One query [D], or the last T positions as queries [T, D], through a table of blocks (default: in their order)."""
    table = list(range(-(-len(k) // block))) if table is None else table
    rows = q[None] if q.ndim == 1 else q
    result = _native.attend(rows, k, v, np.array(table, np.int32), block, int8, isa)
    return result[0] if q.ndim == 1 else result


def case(length: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length * dim)
    return rng.standard_normal(dim, np.float32), *(rng.standard_normal((length, dim), np.float32) for _ in range(2))


@pytest.mark.parametrize("dim", [4, 8, 20, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64, 65, 1000])
def test_equals_torch(length: int, dim: int) -> None:
    q, k, v = case(length, dim)
    expected = attend(q, k, v)
    for int8, tolerance in ((False, 2e-6), (True, 0.03)):  # int8: 0.5% each on q, k and v, amplified by the softmax
        results = [native_attend(q, k, v, int8, isa) for isa in ISAS]
        assert np.abs(results[0] - expected).max() <= tolerance * np.abs(v).max()
        for result in results[1:]:
            assert np.array_equal(result, results[0])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_one_key_far_ahead(isa: str, int8: bool) -> None:
    """Scores hundreds apart: the softmax becomes a choice, without overflow."""
    q, k, v = case(50, 64)
    k *= 0.01
    k[31] = q * 50.0
    np.testing.assert_allclose(native_attend(q, k, v, int8, isa), v[31], atol=0.02 if int8 else 1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_zeros(isa: str, int8: bool) -> None:
    zero = np.zeros((10, 64), np.float32)
    _, _, v = case(10, 64)
    np.testing.assert_allclose(native_attend(zero[0], zero, v, int8, isa), v.mean(0), atol=0.02 if int8 else 1e-6)
    assert not native_attend(zero[0], zero, zero, int8, isa).any()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("length", "queries", "dim"),
    [
        (1, 1, 8),
        (70, 70, 64),
        (200, 37, 20),
        (129, 65, 128),
        (64, 2, 4),
        (300, 200, 64),
        (90, 33, 256),
        (131, 8, 64),
        (131, 7, 64),
    ],
)
def test_many_queries_give_the_bits_of_each_alone(length: int, queries: int, dim: int, int8: bool) -> None:
    """A chunk of a prompt: query i sees the keys up to its own position and no further."""
    _, k, v = case(length, dim)
    q = np.random.default_rng(length).standard_normal((queries, dim), np.float32)
    ends = range(length - queries + 1, length + 1)
    expected = np.stack([native_attend(q[i], k[:end], v[:end], int8, "portable") for i, end in enumerate(ends)])
    for isa in ISAS:
        assert np.array_equal(native_attend(q, k, v, int8, isa), expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 80])
def test_any_table_gives_the_same_bits(block: int, int8: bool) -> None:
    q, k, v = case(333, 64)
    expected = native_attend(q, k, v, int8, "auto")
    table = np.random.default_rng(block).permutation(40)[: -(-333 // block)].tolist()
    chunk = np.stack([q] * 40)
    for isa in ISAS:
        assert np.array_equal(native_attend(q, k, v, int8, isa, table=table, block=block), expected)
        assert np.array_equal(native_attend(chunk, k, v, int8, isa, table=table, block=block)[-1], expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_a_growing_maximum(isa: str, int8: bool) -> None:
    """Every tile beats the ones before: what is already summed is scaled down each time."""
    q, k, v = case(500, 64)
    k = 0.01 * k + np.linspace(0, 3, 500, dtype=np.float32)[:, None] * np.sign(q) / 8
    np.testing.assert_allclose(native_attend(q, k, v, int8, isa), attend(q, k, v), atol=0.08 if int8 else 1e-5)


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows as int8 codes with a scale each, multiplied out."""
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    return np.rint(np.divide(x, scale, out=np.zeros(x.shape), where=scale > 0)) * scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_int8_rounds_inputs_and_hardly_anything_else(isa: str, size: float, spread: float) -> None:
    """Weights of a tile are rounded to 14 bits of its largest: a hundredth of what rounding the values costs."""
    q, k, v = case(333, 64)
    q, v = np.float32(spread) * q, np.float32(size) * v
    expected = attend(rounded(q).astype(np.float32), rounded(k).astype(np.float32), rounded(v))
    np.testing.assert_allclose(native_attend(q, k, v, True, isa), expected, rtol=0, atol=1e-4 * np.abs(v).max())


@pytest.mark.parametrize("isa", ISAS)
def test_int8_keeps_small_weights_beside_a_large_one_of_a_small_value(isa: str) -> None:
    """The first key takes nearly all attention and holds nearly nothing, as the first tokens of trained models do."""
    q, k, v = case(64, 64)
    k *= 0.01
    k[0] = q / np.linalg.norm(q) * 64.0
    v[0] *= 1e-3
    expected = attend(rounded(q).astype(np.float32), rounded(k).astype(np.float32), rounded(v))
    result = native_attend(q, k, v, True, isa)
    assert np.abs(result - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("isa", ISAS)
def test_int8_of_a_tile_without_weight(isa: str) -> None:
    """Keys so far behind that their weights are zero add nothing, whatever their values are."""
    q, k, v = case(192, 64)
    k[:128] = -q
    k[128:] = q
    v[:128] *= 1e20
    q *= 30
    np.testing.assert_allclose(native_attend(q, k, v, True, isa), v[128:].mean(0), atol=0.02)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("key", [3, 39])
def test_int8_values_that_overflow_show(isa: str, key: int) -> None:
    """Not finite in, not finite out, for one query and for many: the decoder's check must see it."""
    q, k, v = case(40, 64)
    v[key] = np.inf
    assert not np.isfinite(native_attend(q, k, v, True, isa)).any()
    assert not np.isfinite(native_attend(np.stack([q] * 8), k, v, True, isa)[-1]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [2, 3, 20])
def test_int8_values_behind_a_query_change_nothing(isa: str, queries: int) -> None:
    """Even if they overflowed: a token that was refused leaves an infinite scale in the record of later ones."""
    _, k, v = case(40, 64)
    q = np.random.default_rng(0).standard_normal((queries, 64), np.float32)
    expected = native_attend(q, k, v, True, isa)
    v[-1] = np.inf
    result = native_attend(q, k, v, True, isa)
    assert np.array_equal(result[:-1], expected[:-1]) and not np.isfinite(result[-1]).any()
