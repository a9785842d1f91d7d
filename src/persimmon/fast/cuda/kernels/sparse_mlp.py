"""The MLP with its zeros: y = down . relu(up . x + b)^2, reading only the rows of `down` that the zeros leave.

The up projection (`matmul.multiply_active`, or `progressive_up` below) writes the active neurons of every segment of
neurons and their number; nothing of it ever reaches the host. `down` walks along those lists: a program has BLOCK_H
columns and the segments of one split, and loads whole pieces of rows, ACTIVE at a time. Splits write partial sums,
which `norm.residual_layer_norm` adds in a fixed order: the result does not depend on timing.

progressive_up, p44 only, one token. The high plane of every neuron gives an estimate and its deviation `spread`; a
neuron whose estimate is at most -margin * spread is taken for inactive, and only the others have their low plane read:
the loads of the rest are masked off. The semantics are those of the CPU engine (fast/cpu/native/sparse_mlp.h): estimate
16 high - 120.5 per weight, low part low - 7.5, spread^2 = 256 / 12 sum(scale^2 sum(x^2)); an infinite margin reads
everything and gives the int8 weights' result. One difference: inputs are not rounded to int8 here.

When it does not pay: with several tokens the union of their active neurons grows, and gathered rows use the memory less
well than streams. `choice.py` decides by measurement; without one, everything runs dense.
Rounding: as matmul.py; a value in the list is rounded to the activations' type, as on the dense path.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import INTERPRETED, ceil_div, power_of_two, tile
from persimmon.fast.cuda.kernels.matmul import (
    OUTLIERS,
    ActiveList,
    _outlier_products,
    empty_list,
    gemv_tiles,
    list_active,
    weight_tile,
)
from persimmon.fast.cuda.layouts import PLANES, Matrix

MOST_ACTIVE_TOKENS = 8
"""Tokens that may share a list: their union grows (57 % of a layer at 10 % each, if independent)."""


@triton.jit
def down_kernel(
    values, ids, counts, codes, scales, out, neurons, outputs, columns, num_segments, tokens,
    FORMAT: tl.constexpr, LISTED: tl.constexpr, SEGMENT: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Out [SPLITS, tokens, outputs]: sums of value * neuron row over a split's segments."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    share = tl.cdiv(num_segments, SPLITS)
    token = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH, BLOCK_H], tl.float32)
    for segment in range(split * share, tl.minimum((split + 1) * share, num_segments)):
        count = tl.load(counts + segment) if LISTED else tl.minimum(SEGMENT, neurons - segment * SEGMENT)
        for first in range(0, count, ACTIVE):
            rank = first + tl.arange(0, ACTIVE)
            there = rank < count
            place = segment * SEGMENT + rank
            neuron = tl.load(ids + place, mask=there, other=0) if LISTED else place
            inside = there[:, None] & (h < outputs)[None, :]
            rows = weight_tile(codes, codes, scales, neuron[:, None], h[None, :], columns, inside, FORMAT)
            if WIDTH == 1:
                value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
                acc += tl.sum(value[:, None] * rows, axis=0)[None, :]
            else:
                value = tl.load(values + place[None, :] * WIDTH + token[:, None], mask=there[None, :], other=0.0)
                if UPCAST:
                    rows = rows.to(value.dtype).to(tl.float32)
                    acc += tl.dot(value.to(tl.float32), rows, input_precision="ieee")
                else:
                    acc += tl.dot(value, rows.to(value.dtype), input_precision="ieee")
    at = (split * tokens + token)[:, None] * outputs + h[None, :]
    tl.store(out + at, acc, mask=(token < tokens)[:, None] & (h < outputs)[None, :])


@triton.jit
def _plane_part(
    x, is_outlier, scales, pair, byte, first, half: tl.constexpr, row, rows, groups, inputs, BLOCK_K: tl.constexpr
):
    """One half of the bytes `pair` [N, K / 2] of a plane: codes, their groups' scales, inputs without the outliers."""
    code = ((pair >> (4 * half)) & 15).to(tl.float32)
    k = byte // 32 * 64 + byte % 32 + 32 * half
    held = k < inputs
    outlier = tl.load(is_outlier + k, mask=held, other=0)
    inputs_part = tl.load(x + k, mask=held & (outlier == 0), other=0.0).to(tl.float32)
    group = first // 32 + 2 * tl.arange(0, BLOCK_K // 64) + half
    known = rows[:, None] & (group < groups)[None, :]
    scale = tl.load(scales + row[:, None] * groups + group[None, :], mask=known, other=0.0).to(tl.float32)
    return code, scale, inputs_part


@triton.jit
def progressive_up_kernel(
    x, is_outlier, high, low, scales, outlier_weights, outlier_columns, bias, values, ids, counts, read,
    outputs, inputs, columns, margin, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token, PLANES; a list of active neurons, and per segment the neurons whose low plane was read."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    real = n < outputs
    groups = columns // 32
    estimate = tl.zeros([BLOCK_N], tl.float32)
    variance = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)
        pair = tl.load(high + row[:, None] * (columns // 2) + byte[None, :],
                       mask=real[:, None] & (byte < columns // 2)[None, :], other=0).to(tl.int32)  # fmt: skip
        for half in tl.static_range(2):
            code, scale, inputs_part = _plane_part(
                x, is_outlier, scales, pair, byte, first, half, row, real, groups, inputs, BLOCK_K
            )
            product = (16.0 * code - 120.5) * inputs_part[None, :]
            estimate += tl.sum(scale * tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 64, 32)), axis=2), axis=1)
            energy = tl.sum(tl.reshape(inputs_part * inputs_part, (BLOCK_K // 64, 32)), axis=1)
            variance += tl.sum(scale * scale * energy[None, :], axis=1)
    estimate += _outlier_products(x, outlier_weights, outlier_columns, row, real)
    estimate += tl.load(bias + n, mask=real, other=0.0)
    spread = tl.sqrt(variance * (256.0 / 12.0))
    wanted = real & (estimate > -margin * spread)
    wanted = tl.where(margin == float("inf"), real, wanted)  # inf * 0 is no number
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        for first in range(0, inputs, BLOCK_K):
            byte = first // 2 + tl.arange(0, BLOCK_K // 2)
            pair = tl.load(low + row[:, None] * (columns // 2) + byte[None, :],
                           mask=wanted[:, None] & (byte < columns // 2)[None, :], other=0).to(tl.int32)  # fmt: skip
            for half in tl.static_range(2):
                code, scale, inputs_part = _plane_part(
                    x, is_outlier, scales, pair, byte, first, half, row, wanted, groups, inputs, BLOCK_K
                )
                product = (code - 7.5) * inputs_part[None, :]
                estimate += tl.sum(scale * tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 64, 32)), axis=2), axis=1)
    activation = tl.where(wanted, tl.maximum(estimate, 0.0), 0.0)
    activation = (activation * activation).to(values.dtype.element_ty)
    list_active(values, ids, counts, activation[:, None], n, real[:, None], 1, BLOCK_N)
    tl.store(read + tl.program_id(0), tl.sum(wanted.to(tl.int32), axis=0))


def down_tiles(width: int, outputs: int) -> dict[str, int]:
    """Compile-time tile sizes of down: for one token 8 rows of 512 columns in flight. Not measured."""
    return {
        "ACTIVE": tile(8 if width == 1 else 16, 512),
        "BLOCK_H": min(tile(512, 4096), max(16, power_of_two(outputs))),
    }


def down_splits(num_segments: int, outputs: int, processors: int) -> int:
    """Ranges of segments, so that two programs per multiprocessor share them; at most 32. Not measured."""
    tiles = ceil_div(outputs, down_tiles(1, outputs)["BLOCK_H"])
    return max(1, min(32, num_segments, 2 * processors // tiles))


def down_active(active: ActiveList, matrix: Matrix, splits: int) -> Tensor:
    """Partial sums [splits, tokens, outputs] float32 over the listed neurons of a neuron-major matrix."""
    return _down(active.values, active, matrix, active.tokens, splits)


def down_all(hidden: Tensor, matrix: Matrix, splits: int) -> Tensor:
    """The same over all neurons for one token [1, F]: the dense path of a neuron-major matrix."""
    assert hidden.shape[0] == 1, "several tokens go to the matrix units"
    return _down(hidden, None, matrix, 1, splits)


def _down(values: Tensor, active: ActiveList | None, matrix: Matrix, tokens: int, splits: int) -> Tensor:
    assert matrix.neuron_major and matrix.format != PLANES, "rows are neurons"
    out = torch.empty(splits, tokens, matrix.outputs, dtype=torch.float32, device=values.device)
    width = 1 if active is None else values.shape[1]
    segment = active.segment if active is not None else tile(64, 4096)
    tiles = down_tiles(width, matrix.outputs)
    ids, counts = (active.ids, active.counts) if active is not None else (values, values)
    down_kernel[(ceil_div(matrix.outputs, tiles["BLOCK_H"]), splits)](
        values, ids, counts, matrix.codes, values if matrix.scales is None else matrix.scales, out,
        matrix.inputs, matrix.outputs, matrix.columns, ceil_div(matrix.inputs, segment), tokens,
        FORMAT=matrix.format, LISTED=active is not None, SEGMENT=segment, SPLITS=splits, WIDTH=width,
        UPCAST=INTERPRETED, **tiles,
    )  # fmt: skip
    return out


def outlier_mask(matrix: Matrix) -> Tensor:
    """uint8 [inputs]: 1 at the columns that a PLANES matrix keeps apart."""
    assert matrix.outlier_columns is not None and matrix.outlier_columns.shape[0] == OUTLIERS, "planes have outliers"
    mask = torch.zeros(matrix.inputs, dtype=torch.uint8, device=matrix.codes.device)
    mask[matrix.outlier_columns[matrix.outlier_columns >= 0].long()] = 1
    return mask


def progressive_up(
    x: Tensor, matrix: Matrix, is_outlier: Tensor, bias: Tensor, margin: float
) -> tuple[ActiveList, Tensor]:
    """The active neurons of one token x [1, K], and per segment how many low rows were read, int32."""
    assert matrix.format == PLANES and x.shape[0] == 1 and not math.isnan(margin), "p44, one token"
    assert matrix.low is not None and matrix.scales is not None, "planes have both"
    tiles = gemv_tiles(PLANES, matrix.inputs)
    active = empty_list(matrix.outputs, tiles["BLOCK_N"], 1, 1, x)
    read = torch.empty_like(active.counts)
    progressive_up_kernel[(active.counts.shape[0],)](
        x, is_outlier, matrix.codes, matrix.low, matrix.scales, matrix.outlier_weights, matrix.outlier_columns, bias,
        active.values, active.ids, active.counts, read, matrix.outputs, matrix.inputs, matrix.columns, margin, **tiles,
    )  # fmt: skip
    return active, read
