"""The residual stream: add what a block computed, normalise; and the MLP's activation where a library made the product.

residual_layer_norm   x += sum of partial results + their bias; out = LayerNorm(x). One read and one write of the stream
                      instead of three; the partial results of split products are summed here, in a fixed order.
bias_squared_relu     out = relu(x + bias)^2.

Layout: row-major, a program has whole rows, so statistics need no second pass. The stream is float32 whatever the
weights are; statistics are float32 (the variance from the centred values, as in PyTorch).
Not supported: rows longer than 65,536.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import begin, ceil_div, early, power_of_two, tile
from persimmon.fast.cuda.kernels.matmul import squared_relu


@triton.jit
def residual_layer_norm_kernel(
    x, partial, partial_bias, weight, bias, out, num_rows, hidden, eps,
    EARLY: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X [T, H] float32 in place; partial [PARTIALS, T, H]; out [T, H]."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < hidden)[None, :]
    at = row.to(tl.int64)[:, None] * hidden + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    if PARTIALS > 0:
        added = tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, PARTIALS):
            partial += num_rows * hidden
            added += tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
        added += tl.load(partial_bias + column, mask=column < hidden, other=0.0)[None, :]
        values += tl.where(inside, added, 0.0)
        tl.store(x + at, values, mask=inside)
    mean = tl.sum(values, axis=1) / hidden
    centred = tl.where(inside, values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=1) / hidden + eps)
    gain = tl.load(weight + column, mask=column < hidden, other=0.0)[None, :]
    shift = tl.load(bias + column, mask=column < hidden, other=0.0)[None, :]
    normal = centred / deviation[:, None] * gain + shift
    tl.store(out + at, normal.to(out.dtype.element_ty), mask=inside)


def norm_tiles(hidden: int) -> dict[str, int]:
    """Compile-time constants of residual_layer_norm."""
    return {"ROWS": tile(1, 256), "BLOCK": power_of_two(hidden)}


def residual_layer_norm(
    x: Tensor, partial: Tensor | None, partial_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Add partial [P, T, H] + partial_bias [H] to x [T, H] float32 in place; its LayerNorm [T, H] in `dtype`."""
    rows, hidden = x.shape
    out = torch.empty(rows, hidden, dtype=dtype, device=x.device)
    tiles = norm_tiles(hidden)
    count = 0 if partial is None else partial.shape[0]
    residual_layer_norm_kernel[(ceil_div(rows, tiles["ROWS"]),)](
        x, x if partial is None else partial, weight if partial_bias is None else partial_bias, weight, bias, out,
        rows, hidden, eps, PARTIALS=count, **early(x.device), **tiles, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def bias_squared_relu_kernel(x, bias, out, count, width, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """Out = relu(x + bias)^2 over `count` numbers in rows of `width`."""
    begin(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + at % width, mask=inside, other=0.0)
    tl.store(out + at, squared_relu(value).to(out.dtype.element_ty), mask=inside)


def activation_tiles() -> dict[str, int]:
    """Compile-time constants of bias_squared_relu."""
    return {"BLOCK": tile(1024, 65_536)}


def bias_squared_relu(x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """relu(x + bias)^2 for x [T, F], bias [F] float32; squared in float32, then in `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    tiles = activation_tiles()
    bias_squared_relu_kernel[(ceil_div(x.numel(), tiles["BLOCK"]),)](
        x, bias, out, x.numel(), x.shape[-1], **early(x.device), **tiles
    )
    return out
