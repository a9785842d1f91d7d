"""The MLP with its zeros against the dense product: all zero, all active, one active; the margin of p44."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import triton_interpreter
from gpu_matrices import as_numbers, make, random
from persimmon.fast.cuda.kernels import sparse_mlp
from persimmon.fast.cuda.layouts import Matrix

DEVICE = triton_interpreter.DEVICE


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "q8"])
def test_only_active_rows_are_needed(kind: str, tokens: int) -> None:
    """Rows of inactive neurons hold nan: reading one would show."""
    for name, keep in (("some", range(0, 90, 7)), ("none", ()), ("all", range(90)), ("one", (89,))):
        down = make(kind, 40, 90, neuron_major=True)
        hidden = torch.zeros(tokens, 90, device=DEVICE)
        chosen = torch.tensor(keep, dtype=torch.int64, device=DEVICE)
        hidden[-1, chosen] = random(len(chosen), seed=3).square() + 1e-3
        hidden[0, chosen[:2]] = 5.0
        expected = hidden.double() @ as_numbers(down).T
        poison(down, hidden.amax(0) == 0)
        for splits in (1, 3, 32):
            arrivals = zeros(8)
            result = sparse_mlp.down(hidden, down, splits, arrivals, skip=True)
            assert result.shape == (tokens, 40) and not arrivals.any(), name
            scale = expected.abs().max().clamp_min(1).item()
            torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def test_what_is_no_number_stays_visible() -> None:
    hidden = torch.zeros(2, 90, device=DEVICE)
    hidden[1, 33] = math.nan
    result = sparse_mlp.down(hidden, make("float32", 40, 90, neuron_major=True), 3, zeros(8), skip=True)
    assert result[1].isnan().all() and not result[0].isnan().all()


def poison(down: Matrix, inactive: Tensor) -> None:
    if down.format == 1 or down.format == 3:
        down.scales[inactive] = math.nan
    else:
        down.codes[inactive] = math.nan


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "q8"])
def test_all_rows(kind: str, tokens: int) -> None:
    down, hidden = make(kind, 40, 90, neuron_major=True), random(tokens, 90).relu().square()
    result = sparse_mlp.down(hidden, down, 2, zeros(8), skip=False)
    torch.testing.assert_close(result.double(), hidden.double() @ as_numbers(down).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("skip", [True, False])
def test_all_tiles_of_a_gpu(tokens: int, skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs over columns and splits, the last of which is not full: lists and counters of their own."""
    monkeypatch.setattr(sparse_mlp, "tile", lambda on_gpu, interpreted: on_gpu)
    down, arrivals = make("q8", 200, 333, neuron_major=True), zeros(16)
    hidden = (random(tokens, 333, seed=5) - 1.0).relu().square()
    result = sparse_mlp.down(hidden, down, 5, arrivals, skip=skip)
    torch.testing.assert_close(result.double(), hidden.double() @ as_numbers(down).T, rtol=1e-4, atol=1e-3)
    assert not arrivals.any(), "ready for the next call"


def progressive(x: Tensor, up: Matrix, bias: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The definition in float64: activations, and which neurons have their low plane read."""
    columns = up.outlier_columns[up.outlier_columns >= 0].long()
    weights = as_numbers(up).clone()
    outliers = weights[:, columns]
    weights[:, columns] = 0
    inputs = x[0].double().clone()
    inputs[columns] = 0
    scales = up.scales.double().repeat_interleave(32, 1)[:, : up.inputs]
    high = nibbles(up.codes)[:, : up.inputs].double()
    estimate = ((16 * high - 120.5) * scales) @ inputs + outliers @ x[0, columns].double() + bias.double()
    spread = (256 / 12 * (scales**2 @ inputs**2)).sqrt()
    kept = torch.ones_like(spread, dtype=torch.bool) if math.isinf(margin) else estimate > -margin * spread
    exact = weights @ inputs + outliers @ x[0, columns].double() + bias.double()
    return torch.where(kept, exact, 0.0).relu().square(), kept


def nibbles(codes: Tensor) -> Tensor:
    """[R, columns]: bits 4 i of word j of a group hold its column 4 i + j."""
    words = codes.view(codes.shape[0], -1, 1, 4)
    return ((words >> torch.arange(0, 32, 4, device=codes.device)[:, None]) & 15).reshape(codes.shape[0], -1)


@pytest.mark.parametrize("margin", [math.inf, 2.0, 0.5, 0.0])
def test_progressive_up(margin: float) -> None:
    up, x, bias = make("planes", 200, 300), random(1, 300, seed=3), random(200, seed=4) * 30 - 20
    up.outlier_weights.mul_(3)
    hidden, read = sparse_mlp.progressive_up(x, up, sparse_mlp.outlier_mask(up), bias, margin)
    expected, kept = progressive(x, up, bias, margin)
    assert int(read.sum()) == int(kept.sum())
    torch.testing.assert_close(hidden[0].double(), expected, rtol=1e-4, atol=1e-2)
    if math.isinf(margin):
        assert int(read.sum()) == 200
    else:
        assert 0 < int(read.sum()) < 200


def test_progressive_up_of_nothing() -> None:
    """No input: no estimate has a deviation, and a negative bias decides alone, whatever the margin."""
    up, zeros = make("planes", 20, 64), torch.zeros(1, 64, device=DEVICE)
    for margin in (0.0, 2.0, math.inf):
        bias = torch.full((20,), -1.0, device=DEVICE)
        bias[7] = 2.0
        hidden, _ = sparse_mlp.progressive_up(zeros, up, sparse_mlp.outlier_mask(up), bias, margin)
        assert hidden[0].nonzero().flatten().tolist() == [7] and hidden[0, 7] == 4.0
