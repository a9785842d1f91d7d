"""The MLP with its zeros: y = down . relu(up . x + b)^2, reading only the rows of `down` that the zeros leave.

down  Hidden values [T, F] times a neuron-major matrix. A program has BLOCK_H columns of the neurons of one split and
      walks along their rows, ACTIVE at a time; with SKIP it first lists those of its neurons that any token has active
      and loads no other row. Nothing of it ever reaches the host. Splits write partial sums, which the program that
      ends last adds in their order, and lists keep the neurons' order: the result does not depend on timing. Every
      program of a split makes the same list: that costs less than a launch of its own.

progressive_up, p44 only, one token. The high plane of every neuron gives an estimate and its deviation `spread`; a
neuron whose estimate is at most -margin * spread is taken for inactive, and only the others have their low plane read:
the loads of the rest are masked off. The semantics are those of the CPU engine (fast/cpu/native/sparse_mlp.h): estimate
16 high - 120.5 per weight, low part low - 7.5, spread^2 = 256 / 12 sum(scale^2 sum(x^2)); an infinite margin reads
everything and gives the int8 weights' result. One difference: inputs are not rounded to int8 here.

When it does not pay: with several tokens the union of their active neurons grows, and gathered rows use the memory less
well than streams. `choice.py` decides by measurement; without one, everything runs dense.
Rounding: one token, exact weights in float32; more, weights in the activations' type. Hidden values are of that type.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cpu.formats import OUTLIERS
from persimmon.fast.cuda.kernels.launch import INTERPRETED, begin, ceil_div, early, is_last, power_of_two, tile
from persimmon.fast.cuda.kernels.matmul import dot, gemv_tiles, squared_relu
from persimmon.fast.cuda.kernels.weight_tiles import (
    byte_tile,
    group_scales,
    outlier_products,
    packed_code,
    packed_column,
    packed_unit,
    packed_words,
)
from persimmon.fast.cuda.layouts import INT4, PLANES, Matrix
from persimmon.fast.cuda.plan import MOST_PARTS

MOST_ACTIVE_TOKENS = 8
"""Tokens that may share a list: their union grows (57 % of a layer at 10 % each, if independent)."""


@triton.jit
def _list_active(hidden, ids, first, end, neurons, tokens, ROOM: tl.constexpr):
    """Write the neurons first .. end that any token has active to `ids`, in order; how many there are."""
    n = first + tl.arange(0, ROOM)
    active = tl.zeros([ROOM], tl.int32)
    for token in range(tokens):
        value = tl.load(hidden + token * neurons + n, mask=n < end, other=0.0)
        active = tl.where(value != 0, 1, active)  # not "> 0": what is no number must stay visible
    tl.store(ids + tl.cumsum(active, axis=0) - 1, n, mask=active > 0)
    tl.debug_barrier()  # other threads of the program read what is written here
    return tl.sum(active, axis=0)


@triton.jit
def down_kernel(
    hidden, ids, codes, scales, partial, out, arrivals, neurons, outputs, columns, share, tokens,
    FORMAT: tl.constexpr, SKIP: tl.constexpr, EARLY: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVE: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out [tokens, outputs], from partial [SPLITS, tokens, outputs]: sums over a split's `share` neurons."""
    begin(EARLY)
    first_column = tl.program_id(0) * BLOCK_H
    split = tl.program_id(1)
    start = split * share
    count = tl.minimum(share, neurons - start)
    ids += (split * tl.num_programs(0) + tl.program_id(0)) * ROOM
    if SKIP:
        count = _list_active(hidden, ids, start, start + count, neurons, tokens, ROOM)
    token = tl.arange(0, WIDTH)
    acc = tl.zeros([ACTIVE if WIDTH == 1 else WIDTH, BLOCK_H], tl.float32)
    for first in range(0, count, ACTIVE):
        place = first + tl.arange(0, ACTIVE)
        there = place < count
        neuron = (tl.load(ids + place, mask=there, other=0) if SKIP else start + place).to(tl.int64)
        factor = tl.full([ACTIVE], 1.0, tl.float32)
        if WIDTH == 1:
            factor = tl.load(hidden + neuron, mask=there, other=0.0).to(tl.float32)
        rows = byte_tile(codes, scales, neuron, factor, first_column, there, outputs, columns, FORMAT, ACTIVE, BLOCK_H)
        if WIDTH == 1:
            acc += rows
        else:
            held = (token < tokens)[:, None] & there[None, :]
            values = tl.load(hidden + token[:, None] * neurons + neuron[None, :], mask=held, other=0.0)
            acc += dot(values, rows.to(values.dtype), UPCAST)
    if WIDTH == 1:
        acc = tl.sum(acc, axis=0)[None, :]
    h = first_column + tl.arange(0, BLOCK_H)
    inside = (token < tokens)[:, None] & (h < outputs)[None, :]
    at = token[:, None] * outputs + h[None, :]
    size = tokens * outputs
    tl.store(partial + split * size + at, acc, mask=inside)
    if is_last(arrivals + tl.program_id(0), SPLITS):
        total = tl.load(partial + at, mask=inside, other=0.0, cache_modifier=".cg")
        for number in tl.static_range(1, SPLITS):
            total += tl.load(partial + number * size + at, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(out + at, total, mask=inside)


@triton.jit
def _plane_sums(
    x, is_outlier, plane, scales, row, rows, first, inputs, columns, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Of BLOCK_K columns of a plane: sums of (nibble - 8) * x by group [N, K / 32], sums of x and of x^2, and scales.

    Inputs that outliers meet count as 0.
    """
    word = first // 8 + tl.arange(0, BLOCK_K // 8)
    words, _ = packed_words(plane, plane, row, word, rows, columns, 2)
    product = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    total = tl.zeros([BLOCK_K // 8], tl.float32)
    energy = tl.zeros([BLOCK_K // 8], tl.float32)
    for i in tl.static_range(8):
        k = packed_column(word, i)
        held = k < inputs
        outlier = tl.load(is_outlier + k, mask=held, other=0)
        inputs_part = tl.load(x + k, mask=held & (outlier == 0), other=0.0).to(tl.float32)
        product += packed_code(words, words, i, 2) * (inputs_part * packed_unit(i, 2))[None, :]
        total += inputs_part
        energy += inputs_part * inputs_part
    sums = tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 32, 4)), axis=2)
    total_sums = tl.sum(tl.reshape(total, (BLOCK_K // 32, 4)), axis=1)
    energy_sums = tl.sum(tl.reshape(energy, (BLOCK_K // 32, 4)), axis=1)
    return sums, total_sums, energy_sums, group_scales(scales, row, first, rows, columns, BLOCK_K // 32)


@triton.jit
def progressive_up_kernel(
    x, is_outlier, high, low, scales, outlier_weights, outlier_columns, bias, hidden, read,
    outputs, inputs, columns, margin, EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token, PLANES; hidden values [N], and per program how many neurons had their low plane read."""
    begin(EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    real = n < outputs
    estimates = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    variances = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        sums, total, energy, scale = _plane_sums(
            x, is_outlier, high, scales, row, real, first, inputs, columns, BLOCK_N, BLOCK_K
        )
        estimates += scale * (16.0 * sums + 7.5 * total[None, :])  # 16 high - 120.5 is 16 (high - 8) + 7.5
        variances += scale * scale * energy[None, :]
    estimate = tl.sum(estimates, axis=1) + outlier_products(x, outlier_weights, outlier_columns, row, real)
    estimate += tl.load(bias + n, mask=real, other=0.0)
    spread = tl.sqrt(tl.sum(variances, axis=1) * (256.0 / 12.0))
    inactive = estimate <= -margin * spread  # false where either is no number: inf * 0, and what must stay visible
    wanted = real & (inactive == 0)
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        rest = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
        for first in range(0, inputs, BLOCK_K):
            sums, total, _, scale = _plane_sums(
                x, is_outlier, low, scales, row, wanted, first, inputs, columns, BLOCK_N, BLOCK_K
            )
            rest += scale * (sums + 0.5 * total[None, :])  # low - 7.5 is (low - 8) + 0.5
        estimate += tl.sum(rest, axis=1)
    activation = squared_relu(tl.where(wanted, estimate, 0.0))
    tl.store(hidden + n, activation.to(hidden.dtype.element_ty), mask=real)
    tl.store(read + tl.program_id(0), tl.sum(wanted.to(tl.int32), axis=0))


def down_tiles(width: int, outputs: int) -> dict[str, int]:
    """Tile sizes of down: rows at a time, and columns of a program."""
    rows, columns, warps = (64, 64, 2) if width == 1 else (32, 128, 8)  # the fastest for bfloat16 and where it skips
    sizes = {"ACTIVE": tile(rows, 512), "BLOCK_H": min(tile(columns, 4096), max(32, power_of_two(outputs)))}
    return sizes | {"num_warps": warps}


def down_splits(tokens: int, matrix: Matrix, processors: int) -> int:
    """Ranges of neurons, so that four to eight programs per multiprocessor share them; at most 2 * MOST_PARTS."""
    tiles = ceil_div(matrix.outputs, down_tiles(_width(tokens), matrix.outputs)["BLOCK_H"])
    # Partial sums of more tokens are more to write and read, and to keep.
    most = 2 * MOST_PARTS if tokens <= MOST_ACTIVE_TOKENS else MOST_PARTS
    return max(1, min(most, ceil_div(matrix.inputs, 64), 8 * processors // tiles))


def _width(tokens: int) -> int:
    """Rows of a tile of hidden values: one, or what a matrix unit takes."""
    return 1 if tokens == 1 else max(16, power_of_two(tokens))


def down(hidden: Tensor, matrix: Matrix, splits: int, arrivals: Tensor, *, skip: bool) -> Tensor:
    """Hidden values [T, F] times a neuron-major matrix: [T, H] float32.

    skip: rows of neurons that no token has active are not read. arrivals: at least H / 32 zeros, int32, which are zeros
    again afterwards.
    """
    assert matrix.neuron_major and matrix.format not in (INT4, PLANES), "rows are neurons, of whole bytes"
    assert hidden.is_contiguous() and hidden.shape[1] == matrix.inputs, "hidden is [tokens, neurons]"
    tokens, (neurons, outputs) = hidden.shape[0], matrix.stored_shape
    partial = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=hidden.device)
    out, width = torch.empty_like(partial[0]), _width(tokens)
    tiles, share = down_tiles(width, outputs), ceil_div(neurons, splits)
    room, programs = power_of_two(share), ceil_div(outputs, tiles["BLOCK_H"])
    ids = torch.empty(programs * splits * room if skip else 1, dtype=torch.int32, device=hidden.device)
    down_kernel[(programs, splits)](
        hidden, ids, matrix.codes, hidden if matrix.scales is None else matrix.scales, partial, out, arrivals,
        neurons, outputs, matrix.columns, share, tokens, FORMAT=matrix.format, SKIP=skip, ROOM=room, WIDTH=width,
        SPLITS=splits, UPCAST=INTERPRETED, **early(hidden.device), **tiles,
    )  # fmt: skip
    return out


def outlier_mask(matrix: Matrix) -> Tensor:
    """uint8 [inputs]: 1 at the columns that a PLANES matrix keeps apart."""
    assert matrix.outlier_columns is not None and matrix.outlier_columns.shape[0] == OUTLIERS, "planes have outliers"
    mask = torch.zeros(matrix.inputs, dtype=torch.uint8, device=matrix.codes.device)
    mask[matrix.outlier_columns[matrix.outlier_columns >= 0].long()] = 1
    return mask


def progressive_up(x: Tensor, matrix: Matrix, is_outlier: Tensor, bias: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """relu(.)^2 of the up projection for one token x [1, K]: [1, N], and per program how many low rows were read."""
    assert matrix.format == PLANES and x.shape[0] == 1 and not math.isnan(margin), "p44, one token"
    assert matrix.low is not None and matrix.scales is not None, "planes have both"
    tiles = gemv_tiles(PLANES, matrix.inputs)
    programs = ceil_div(matrix.outputs, tiles["BLOCK_N"])
    hidden = torch.empty(1, matrix.outputs, dtype=x.dtype, device=x.device)
    read = torch.empty(programs, dtype=torch.int32, device=x.device)
    progressive_up_kernel[(programs,)](
        x, is_outlier, matrix.codes, matrix.low, matrix.scales, matrix.outlier_weights, matrix.outlier_columns, bias,
        hidden, read, matrix.outputs, matrix.inputs, matrix.columns, margin,
        **early(x.device), **tiles,
    )  # fmt: skip
    return hidden, read
