"""Attention over both kinds of cache against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from packed_layouts import ISAS
from persimmon.fast.cpu import _native


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    q, k, v = (torch.from_numpy(x).double()[None, None] for x in (q[None], k, v))
    return F.scaled_dot_product_attention(q, k, v)[0, 0, 0].numpy()


def case(length: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length * dim)
    return rng.standard_normal(dim, np.float32), *(rng.standard_normal((length, dim), np.float32) for _ in range(2))


@pytest.mark.parametrize("dim", [4, 8, 20, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 1000])
def test_equals_torch(length: int, dim: int) -> None:
    q, k, v = case(length, dim)
    expected = attend(q, k, v)
    for int8, tolerance in ((False, 2e-6), (True, 0.03)):  # int8: 0.5% each on q, k and v, amplified by the softmax
        results = [_native.attend(q, k, v, int8, isa) for isa in ISAS]
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
    np.testing.assert_allclose(_native.attend(q, k, v, int8, isa), v[31], atol=0.02 if int8 else 1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_zeros(isa: str, int8: bool) -> None:
    zero = np.zeros((10, 64), np.float32)
    _, _, v = case(10, 64)
    np.testing.assert_allclose(_native.attend(zero[0], zero, v, int8, isa), v.mean(0), atol=0.02 if int8 else 1e-6)
    assert not _native.attend(zero[0], zero, zero, int8, isa).any()
