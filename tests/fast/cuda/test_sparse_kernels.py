"""The MLP with its zeros against the dense product: all zero, all active, one active; the margin of p44."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import triton_interpreter
from gpu_matrices import as_numbers, make, random
from persimmon.fast.cuda.kernels import matmul, sparse_mlp
from persimmon.fast.cuda.layouts import Matrix

DEVICE = triton_interpreter.DEVICE


def dense(x: Tensor, up: Matrix, bias: Tensor, down: Matrix) -> Tensor:
    """In float64, the hidden values rounded as the kernels do."""
    hidden = matmul.multiply(x, up, bias, squared_relu=True)
    return hidden.double() @ as_numbers(down).T


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "q8"])
def test_only_active_rows_are_needed(kind: str, tokens: int) -> None:
    """Rows of inactive neurons hold nan: reading one would show."""
    up, x = make(kind, 90, 64), random(tokens, 64, seed=3)
    spread = (x.double() @ as_numbers(up).T).std().item()
    biases = {
        "some": random(90, seed=4) * spread - spread,
        "none": torch.full((90,), -1e4, device=DEVICE),
        "all": torch.full((90,), 1e4, device=DEVICE),
        "one": torch.full((90,), -1e4, device=DEVICE).index_fill(0, torch.tensor([89], device=DEVICE), 1e4),
    }
    for name, bias in biases.items():
        down = make(kind, 40, 90, neuron_major=True)
        expected = dense(x, up, bias, down)
        active = matmul.multiply_active(x, up, bias)
        used = {"none": 0, "all": 90, "one": 1}.get(name)
        assert used is None or int(active.counts.sum()) == used
        poison(down, matmul.multiply(x, up, bias, squared_relu=True).amax(0) == 0)
        for splits in (1, 3):
            result = sparse_mlp.down_active(active, down, splits)
            assert result.shape == (splits, tokens, 40)
            scale = expected.abs().max().clamp_min(1).item()
            torch.testing.assert_close(result.sum(0).double(), expected, rtol=1e-4, atol=1e-5 * scale)


def poison(down: Matrix, inactive: Tensor) -> None:
    if down.format == 1 or down.format == 3:
        down.scales[inactive] = math.nan
    else:
        down.codes[inactive] = math.nan


@pytest.mark.parametrize("kind", ["float32", "fp8", "q8"])
def test_all_rows_for_one_token(kind: str) -> None:
    down, hidden = make(kind, 40, 90, neuron_major=True), random(1, 90).relu().square()
    result = sparse_mlp.down_all(hidden, down, 2).sum(0).double()
    torch.testing.assert_close(result, hidden.double() @ as_numbers(down).T, rtol=1e-4, atol=1e-3)


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
    """[R, columns] of pairs that are 32 columns apart."""
    pairs = codes.view(codes.shape[0], -1, 32)
    return torch.stack([pairs & 15, pairs >> 4], 2).reshape(codes.shape[0], -1)


@pytest.mark.parametrize("margin", [math.inf, 2.0, 0.5, 0.0])
def test_progressive_up(margin: float) -> None:
    up, x, bias = make("planes", 200, 300), random(1, 300, seed=3), random(200, seed=4) * 30 - 20
    up.outlier_weights.mul_(3)
    active, read = sparse_mlp.progressive_up(x, up, sparse_mlp.outlier_mask(up), bias, margin)
    expected, kept = progressive(x, up, bias, margin)
    assert int(read.sum()) == int(kept.sum())
    found = torch.zeros(200, dtype=torch.float64, device=DEVICE)
    for segment, count in enumerate(active.counts.tolist()):
        place = slice(segment * active.segment, segment * active.segment + count)
        found[active.ids[place].long()] = active.values[place, 0].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
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
        active, _ = sparse_mlp.progressive_up(zeros, up, sparse_mlp.outlier_mask(up), bias, margin)
        assert int(active.counts.sum()) == 1
        assert active.ids[0] == 7 and active.values[0, 0] == 4.0
