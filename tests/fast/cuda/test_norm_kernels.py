"""Residual sums, LayerNorm and the squared ReLU against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_interpreter
from persimmon.fast.cuda.kernels.norm import bias_squared_relu, residual_layer_norm

DEVICE = triton_interpreter.DEVICE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("partials", [0, 1, 3, 32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (5, 300)], ids=str)
def test_residual_layer_norm(shape: tuple[int, int], partials: int) -> None:
    hidden = shape[1]
    x, gain, shift, bias = random(*shape), random(hidden, seed=1), random(hidden, seed=2), random(hidden, seed=3)
    partial = random(partials, *shape, seed=4) if partials else None
    expected = x + partial.sum(0) + bias if partial is not None else x.clone()
    out = residual_layer_norm(x, partial, bias if partials else None, gain, shift, 1e-5, torch.float32)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, F.layer_norm(expected, (hidden,), gain, shift, 1e-5), rtol=1e-4, atol=1e-5)


def test_hard_rows() -> None:
    """Constant rows (no variance), huge numbers, a large mean with a small spread, a bfloat16 addend."""
    x = torch.stack([torch.zeros(32), torch.full((32,), 7.0), random(32).cpu() * 1e4, 1000 + random(32).cpu() * 0.01])
    x = x.to(DEVICE)
    one, zero = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    expected = F.layer_norm(x, (32,), one, zero, 1e-5)
    out = residual_layer_norm(x.clone(), None, None, one, zero, 1e-5, torch.float32)
    # 1000.01 has 14 bits behind the spread's leading one: the rest is cancellation in either.
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=2e-2)
    added = random(1, 4, 32, seed=5).bfloat16()
    y = x.clone()
    residual_layer_norm(y, added, zero, one, zero, 1e-5, torch.bfloat16)
    torch.testing.assert_close(y, x + added[0].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_squared_relu(dtype: torch.dtype) -> None:
    x, bias = (random(7, 40) * 3).to(dtype), random(40, seed=1)
    x[0, 0], x[1, 1], bias[2] = 300.0, -0.0, -1e5  # 300^2 is beyond float16
    expected = (x.float() + bias).relu().square()
    # bfloat16: one unit of 8 bits, which the interpreter cuts instead of rounding.
    limit = 1e-6 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(bias_squared_relu(x, bias, dtype).float(), expected, rtol=limit, atol=1e-6)
