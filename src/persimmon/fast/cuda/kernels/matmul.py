"""Products with weight matrices in every format: one token, a few tokens, and unpacking for many.

gemv        one token times a row-major matrix. A program has BLOCK_N rows and walks along them, so weights stream
            through once; products and sums are float32 on the ordinary cores: one token gives matrix units no work.
gemm        2 to 64 tokens, padded to 16: the weights are the tall operand of the matrix units, so they still stream
            once. Stored either way round: row-major [N, K], or neuron-major [K, N] as the down projection.
dequantize  the whole matrix into plain numbers, for the library's product over a prompt's chunk: unpacking costs a
            fraction of a product with hundreds of tokens.

Stored rows (`layouts.py`): `codes` [rows, columns]; groups of 32 along a row share a float16 scale.
    PLAIN   bfloat16 or float32
    INT8    w = code * scale
    INT4    byte 32 s + j of a row holds column 64 s + j (low nibble) and 64 s + 32 + j (high); w = (nibble - 8) * scale
    FP8     w = e4m3 code * scale of the stored row (float32)
    PLANES  two INT4 arrays, w = (16 high + low - 128) * scale; 16 input columns apart in float16, where the planes
            hold 0
Epilogues: nothing; + bias; relu(. + bias)^2; the same, stored as lists of active neurons for sparse_mlp.py.

Rounding: gemv multiplies exact weights in float32. gemm and dequantize round code * scale to the activations' type
first (bfloat16: 8 bits; float32: exact) and sum in float32 in blocks of BLOCK_K.
Not supported: fp8 before compute capability 8.9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import INTERPRETED, ceil_div, power_of_two, tile
from persimmon.fast.cuda.layouts import FP8, INT4, INT8, PLAIN, PLANES, Matrix

NOTHING, BIAS, SQUARED_RELU, ACTIVE_LIST = 0, 1, 2, 3
"""Epilogues."""

MOST_TOKENS = 64
"""Beyond it the matrix is unpacked and a library multiplies. Not measured."""

OUTLIERS = 16


@triton.jit
def _nibbles(codes, row, column, columns, inside):
    """4-bit codes 0 .. 15 at (row, column) of a matrix with `columns` columns, as float32."""
    at = row.to(tl.int64) * (columns // 2) + (column // 64) * 32 + column % 32
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return ((byte >> ((column // 32) % 2 * 4)) & 15).to(tl.float32)


@triton.jit
def weight_tile(codes, low, scales, row, column, columns, inside, FORMAT: tl.constexpr):
    """Weights at the stored (row, column), two tensors that broadcast to the tile, as float32."""
    at = row.to(tl.int64) * columns + column
    if FORMAT == 0:
        return tl.load(codes + at, mask=inside, other=0.0).to(tl.float32)
    elif FORMAT == 3:
        scale = tl.load(scales + row + column * 0, mask=inside, other=0.0)
        return tl.load(codes + at, mask=inside, other=0.0).to(tl.float32) * scale
    else:
        group = row.to(tl.int64) * (columns // 32) + column // 32
        scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        if FORMAT == 1:
            return tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale
        elif FORMAT == 2:
            return (_nibbles(codes, row, column, columns, inside) - 8.0) * scale
        else:
            high = _nibbles(codes, row, column, columns, inside)
            return (16.0 * high + _nibbles(low, row, column, columns, inside) - 128.0) * scale


@triton.jit
def list_active(values, ids, counts, neurons, n, inside, TOKENS: tl.constexpr, SEGMENT: tl.constexpr):
    """Of the activations `neurons` [SEGMENT, TOKENS], those rows that any token has active, to the front of a segment.

    Numbers go to `ids`, activations to `values` [place, token], how many there are to `counts`. Ranks are prefix sums,
    so the order is the neurons' own and every run gives the same sums, which atomic counters would not.
    """
    active = tl.max(tl.where(inside, neurons, 0.0), axis=1) > 0.0
    rank = tl.cumsum(active.to(tl.int32), axis=0) - 1
    segment = tl.program_id(0)
    place = segment * SEGMENT + rank
    tl.store(ids + place, n, mask=active)
    tl.store(counts + segment, tl.sum(active.to(tl.int32), axis=0))
    token = tl.arange(0, TOKENS)
    tl.store(values + place[:, None] * TOKENS + token[None, :], tl.where(inside, neurons, 0.0), mask=active[:, None])


@triton.jit
def _finish(
    acc, bias, out, ids, counts, n, token, outputs, tokens,
    EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Epilogue and stores of a tile [BLOCK_N, BLOCK_M]."""
    if EPILOGUE > 0:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0)[:, None]
    if EPILOGUE > 1:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    inside = (n < outputs)[:, None] & (token < tokens)[None, :]
    if EPILOGUE == 3:
        list_active(out, ids, counts, acc.to(out.dtype.element_ty), n, inside, BLOCK_M, BLOCK_N)
    else:
        at = token.to(tl.int64)[None, :] * outputs + n[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemv_kernel(
    x, codes, low, scales, outlier_weights, outlier_columns, bias, out, ids, counts, outputs, inputs, columns,
    FORMAT: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [K]; out [N], or [N, 1] of active neurons."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    real = n < outputs
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        if FORMAT == 0 or FORMAT == 3:
            k = first + tl.arange(0, BLOCK_K)
            inside = real[:, None] & (k < inputs)[None, :]
            w = tl.load(codes + row[:, None] * columns + k[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(w * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :], axis=1)
        elif FORMAT == 1:
            k = first + tl.arange(0, BLOCK_K)
            inside = real[:, None] & (k < columns)[None, :]
            w = tl.load(codes + row[:, None] * columns + k[None, :], mask=inside, other=0).to(tl.float32)
            product = w * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :]
            group = first // 32 + tl.arange(0, BLOCK_K // 32)
            held = real[:, None] & (group < columns // 32)[None, :]
            scale = tl.load(scales + row[:, None] * (columns // 32) + group[None, :], mask=held, other=0.0)
            sums = tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 32, 32)), axis=2)
            acc += tl.sum(sums * scale.to(tl.float32), axis=1)
        else:
            acc += _nibble_products(
                x, codes, low, scales, row, real, first, inputs, columns, FORMAT, BLOCK_N, BLOCK_K
            )  # fmt: skip
    if FORMAT == 3:
        acc *= tl.load(scales + n, mask=real, other=0.0)
    if FORMAT == 4:
        acc += _outlier_products(x, outlier_weights, outlier_columns, row, real)
    _finish(acc[:, None], bias, out, ids, counts, n, tl.arange(0, 1), outputs, 1, EPILOGUE, BLOCK_N, 1)


@triton.jit
def _nibble_products(
    x, codes, low, scales, row, real, first, inputs, columns,
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of INT4 or PLANES rows: each byte is loaded once and gives two products."""
    byte = first // 2 + tl.arange(0, BLOCK_K // 2)
    k = byte // 32 * 64 + byte % 32
    held = real[:, None] & (byte < columns // 2)[None, :]
    at = row[:, None] * (columns // 2) + byte[None, :]
    pair = tl.load(codes + at, mask=held, other=0).to(tl.int32)
    if FORMAT == 2:
        w_even, w_odd = (pair & 15).to(tl.float32) - 8.0, (pair >> 4).to(tl.float32) - 8.0
    else:
        rest = tl.load(low + at, mask=held, other=0).to(tl.int32)
        w_even = ((pair & 15) * 16 + (rest & 15)).to(tl.float32) - 128.0
        w_odd = ((pair >> 4) * 16 + (rest >> 4)).to(tl.float32) - 128.0
    x_even = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)
    x_odd = tl.load(x + k + 32, mask=k + 32 < inputs, other=0.0).to(tl.float32)
    group = first // 32 + 2 * tl.arange(0, BLOCK_K // 64)
    known = real[:, None] & (group < columns // 32)[None, :]
    scale = scales + row[:, None] * (columns // 32) + group[None, :]
    even = tl.sum(tl.reshape(w_even * x_even[None, :], (BLOCK_N, BLOCK_K // 64, 32)), axis=2)
    odd = tl.sum(tl.reshape(w_odd * x_odd[None, :], (BLOCK_N, BLOCK_K // 64, 32)), axis=2)
    even *= tl.load(scale, mask=known, other=0.0).to(tl.float32)
    odd *= tl.load(scale + 1, mask=known, other=0.0).to(tl.float32)
    return tl.sum(even + odd, axis=1)


@triton.jit
def _outlier_products(x, weights, columns, row, real):
    """The 16 input columns of a PLANES matrix that are stored apart."""
    place = tl.arange(0, 16)
    column = tl.load(columns + place)
    inputs = tl.load(x + column, mask=column >= 0, other=0.0).to(tl.float32)
    w = tl.load(weights + row[:, None] * 16 + place[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    return tl.sum(w * inputs[None, :], axis=1)


@triton.jit
def gemm_kernel(
    x, codes, low, scales, outlier_weights, outlier_columns, bias, out, ids, counts, tokens, outputs, inputs, columns,
    FORMAT: tl.constexpr, NEURON_MAJOR: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [M, K]; out [M, N], or [N, BLOCK_M] of active neurons (one block of tokens then)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < outputs)[:, None] & (k < inputs)[None, :]
        if NEURON_MAJOR:
            w = weight_tile(codes, low, scales, k[None, :], n[:, None], columns, inside, FORMAT)
        else:
            w = weight_tile(codes, low, scales, n[:, None], k[None, :], columns, inside, FORMAT)
        held = (k < inputs)[:, None] & (token < tokens)[None, :]
        inputs_tile = tl.load(x + token.to(tl.int64)[None, :] * inputs + k[:, None], mask=held, other=0.0)
        if UPCAST:  # the interpreter's product of bfloat16 is wrong
            acc += tl.dot(w.to(inputs_tile.dtype).to(tl.float32), inputs_tile.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(w.to(inputs_tile.dtype), inputs_tile, input_precision="ieee")
    if FORMAT == 4:
        place = tl.arange(0, 16)
        column = tl.load(outlier_columns + place)
        w = tl.load(
            outlier_weights + n.to(tl.int64)[:, None] * 16 + place[None, :], mask=(n < outputs)[:, None], other=0.0
        )
        held = (column >= 0)[:, None] & (token < tokens)[None, :]
        chosen = tl.load(x + token.to(tl.int64)[None, :] * inputs + column[:, None], mask=held, other=0.0)
        if UPCAST:
            acc += tl.dot(w.to(chosen.dtype).to(tl.float32), chosen.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(w.to(chosen.dtype), chosen, input_precision="ieee")
    _finish(acc, bias, out, ids, counts, n, token, outputs, tokens, EPILOGUE, BLOCK_N, BLOCK_M)


@triton.jit
def dequantize_kernel(
    codes, low, scales, outlier_weights, outlier_columns, out, rows, width, columns,
    FORMAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stored matrix [rows, width] as plain numbers."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    w = weight_tile(codes, low, scales, row[:, None], column[None, :], columns, inside, FORMAT)
    if FORMAT == 4:
        for place in range(16):
            chosen = tl.load(outlier_columns + place)
            kept = tl.load(outlier_weights + row.to(tl.int64) * 16 + place, mask=row < rows, other=0.0).to(tl.float32)
            w = tl.where((column == chosen)[None, :], kept[:, None], w)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside)


def gemv_tiles(matrix_format: int, inputs: int) -> dict[str, int]:
    """Compile-time tile sizes of gemv: 16 rows of 1 KiB or less a step. Not measured."""
    wide = {PLAIN: 512, INT8: 512, FP8: 512, INT4: 1024, PLANES: 512}[matrix_format]
    return {"BLOCK_N": tile(16, 1024), "BLOCK_K": min(tile(wide, 4096), max(64, power_of_two(inputs)))}


def gemm_tiles(tokens: int, inputs: int) -> dict[str, int]:
    """Compile-time tile sizes of gemm. Not measured."""
    sizes = {"BLOCK_N": tile(64, 512), "BLOCK_M": max(16, min(power_of_two(tokens), 64))}
    return sizes | {"BLOCK_K": min(tile(64, 1024), max(16, power_of_two(inputs)))}


def dequantize_tiles() -> dict[str, int]:
    """Compile-time tile sizes of dequantize."""
    return {"BLOCK_R": tile(16, 1024), "BLOCK_C": tile(256, 1024)}


def multiply(
    x: Tensor,
    matrix: Matrix,
    bias: Tensor | None = None,
    *,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X [M, K] times the matrix + bias [N] float32, then relu(.)^2 if asked: [M, N] in `dtype`, default x's.

    M up to MOST_TOKENS; one token must meet a row-major matrix (sparse_mlp.down serves the neuron-major one).
    """
    tokens = x.shape[0]
    out = torch.empty(tokens, matrix.outputs, dtype=dtype or x.dtype, device=x.device)
    epilogue = SQUARED_RELU if squared_relu else BIAS if bias is not None else NOTHING
    _launch(x, matrix, bias, out, None, epilogue)
    return out


def _launch(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, lists: tuple[Tensor, Tensor] | None, epilogue: int
) -> None:
    """Gemv or gemm, by the number of tokens."""
    assert x.is_contiguous() and x.shape[1] == matrix.inputs, "x is [tokens, inputs]"
    tokens = x.shape[0]
    unused = x
    parts = (
        matrix.codes, _or(matrix.low, unused), _or(matrix.scales, unused), _or(matrix.outlier_weights, unused),
        _or(matrix.outlier_columns, unused), _or(bias, unused), out, *(lists or (unused, unused)),
    )  # fmt: skip
    if tokens == 1 and not matrix.neuron_major:
        tiles = gemv_tiles(matrix.format, matrix.inputs)
        gemv_kernel[(ceil_div(matrix.outputs, tiles["BLOCK_N"]),)](
            x, *parts, matrix.outputs, matrix.inputs, matrix.columns, FORMAT=matrix.format, EPILOGUE=epilogue, **tiles
        )
        return
    tiles = gemm_tiles(tokens, matrix.inputs)
    grid = (ceil_div(matrix.outputs, tiles["BLOCK_N"]), ceil_div(tokens, tiles["BLOCK_M"]))
    gemm_kernel[grid](
        x, *parts, tokens, matrix.outputs, matrix.inputs, matrix.columns, FORMAT=matrix.format,
        NEURON_MAJOR=matrix.neuron_major, EPILOGUE=epilogue, UPCAST=INTERPRETED, **tiles,
    )  # fmt: skip


@dataclass(frozen=True)
class ActiveList:
    """The active neurons of a few tokens, on the device, segment by segment."""

    ids: Tensor
    """[segments * segment], int32: the first counts[s] of segment s are active neurons in ascending order."""
    counts: Tensor
    """[segments], int32."""
    values: Tensor
    """[segments * segment, width]: relu(.)^2 of the neuron at the same place in `ids`, for each token, then 0."""
    segment: int
    tokens: int


def multiply_active(x: Tensor, matrix: Matrix, bias: Tensor) -> ActiveList:
    """relu(x [M, K] times the matrix + bias)^2 as a list of the neurons that any of the tokens has active."""
    tokens = x.shape[0]
    if tokens == 1:
        segment, width = gemv_tiles(matrix.format, matrix.inputs)["BLOCK_N"], 1
    else:
        tiles = gemm_tiles(tokens, matrix.inputs)
        segment, width = tiles["BLOCK_N"], tiles["BLOCK_M"]
    assert tokens <= width, "a list holds one block of tokens"
    active = empty_list(matrix.outputs, segment, width, tokens, x)
    _launch(x, matrix, bias, active.values, (active.ids, active.counts), ACTIVE_LIST)
    return active


def empty_list(neurons: int, segment: int, width: int, tokens: int, x: Tensor) -> ActiveList:
    """Room for a list, values in x's type."""
    segments = ceil_div(neurons, segment)
    ids = torch.empty(segments * segment, dtype=torch.int32, device=x.device)
    counts = torch.empty(segments, dtype=torch.int32, device=x.device)
    values = torch.empty(segments * segment, width, dtype=x.dtype, device=x.device)
    return ActiveList(ids, counts, values, segment, tokens)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Kernels take a pointer for every argument; those of other formats are never read."""
    return unused if tensor is None else tensor


def dequantize(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The stored matrix as plain numbers: [N, K], or [K, N] where it is neuron-major. PLAIN comes back itself."""
    if matrix.format == PLAIN:
        return matrix.codes
    rows, width = matrix.stored_shape
    out = torch.empty(rows, width, dtype=dtype, device=matrix.codes.device)
    tiles = dequantize_tiles()
    unused = out
    dequantize_kernel[(ceil_div(rows, tiles["BLOCK_R"]), ceil_div(width, tiles["BLOCK_C"]))](
        matrix.codes, _or(matrix.low, unused), _or(matrix.scales, unused), _or(matrix.outlier_weights, unused),
        _or(matrix.outlier_columns, unused), out, rows, width, matrix.columns, FORMAT=matrix.format, **tiles,
    )  # fmt: skip
    return out
