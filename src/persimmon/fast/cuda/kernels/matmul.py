"""Products with weight matrices in every format: one token, a few tokens, and unpacking for many.

gemv        one token times a row-major matrix. A program has BLOCK_N rows and walks along them, so weights stream
            through once; products and sums are float32 on the ordinary cores: one token gives matrix units no work.
            Sums of groups stay apart until the end, so that threads of a row meet once and not at every step.
gemm        2 to 64 tokens, padded to 16, times a row-major matrix that is quantized: the weights are the tall operand
            of the matrix units, so they still stream once. Ranges of inputs give partial sums where one leaves
            processors idle. Plain matrices of several tokens are the library's.
dequantize  the whole matrix into plain numbers, for the library's product over a prompt's chunk: unpacking costs a
            fraction of a product with hundreds of tokens.

Weights are read as `weight_tiles.py` says. Epilogues: nothing; + bias; relu(. + bias)^2.

Rounding: gemv multiplies exact weights in float32. gemm and dequantize round code * scale to the activations' type
first (bfloat16: 8 bits; float32: exact) and sum in float32 in blocks of BLOCK_K.
Not supported: fp8 before compute capability 8.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import INTERPRETED, begin, ceil_div, early, power_of_two, tile
from persimmon.fast.cuda.kernels.weight_tiles import (
    byte_tile,
    group_scales,
    grouped,
    outlier_products,
    packed_code,
    packed_column,
    packed_unit,
    packed_words,
)
from persimmon.fast.cuda.layouts import FP8, INT4, INT8, PLAIN, PLANES, Matrix
from persimmon.fast.cuda.plan import MOST_PARTS

NOTHING, BIAS, SQUARED_RELU = 0, 1, 2
"""Epilogues."""

MOST_TOKENS = 64
"""Beyond it the matrix is unpacked and a library multiplies."""


@triton.jit
def squared_relu(x):
    """relu(x)^2; what is no number stays so, which the hardware's maximum would lose."""
    x = tl.where(x < 0.0, 0.0, x)
    return x * x


@triton.jit
def _finish(
    acc, bias, out, n, token, outputs, tokens, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Epilogue and stores of a tile [N, M]."""
    if EPILOGUE > 0:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0)[:, None]
    if EPILOGUE > 1:
        acc = squared_relu(acc)
    inside = (n < outputs)[:, None] & (token < tokens)[None, :]
    at = token.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemv_kernel(
    x, codes, low, scales, outlier_weights, outlier_columns, bias, out, outputs, inputs, columns,
    FORMAT: tl.constexpr, EPILOGUE: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [K]; out [N]."""
    begin(EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    real = n < outputs
    if FORMAT == 0 or FORMAT == 3:
        acc = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = real[:, None] & (k < inputs)[None, :]
            w = tl.load(codes + row[:, None] * columns + k[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(w * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :], axis=1)
        if FORMAT == 3:
            acc *= tl.load(scales + n, mask=real, other=0.0)
    elif FORMAT == 1:
        sums = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = real[:, None] & (k < columns)[None, :]
            w = tl.load(codes + row[:, None] * columns + k[None, :], mask=inside, other=0).to(tl.float32)
            product = w * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :]
            scale = group_scales(scales, row, first, real, columns, BLOCK_K // 32)
            sums += tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 32, 32)), axis=2) * scale
        acc = tl.sum(sums, axis=1)
    else:
        sums = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
        for first in range(0, inputs, BLOCK_K):
            word = first // 8 + tl.arange(0, BLOCK_K // 8)
            words, rest = packed_words(codes, low, row, word, real, columns, FORMAT)
            product = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
            for i in tl.static_range(8):
                k = packed_column(word, i)
                inputs_part = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32) * packed_unit(i, FORMAT)
                product += packed_code(words, rest, i, FORMAT) * inputs_part[None, :]
            scale = group_scales(scales, row, first, real, columns, BLOCK_K // 32)
            sums += tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_K // 32, 4)), axis=2) * scale
        acc = tl.sum(sums, axis=1)
    if FORMAT == 4:
        acc += outlier_products(x, outlier_weights, outlier_columns, row, real)
    _finish(acc[:, None], bias, out, n, tl.arange(0, 1), outputs, 1, EPILOGUE)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """[N, K] times [K, M] of one type, summed in float32."""
    if UPCAST:  # the interpreter's product of bfloat16 is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _input_tile(x, token, tokens, k, inputs, EVEN: tl.constexpr):
    """Inputs [K, M]; behind the last token stands the last one again, whose products are not stored."""
    at = x + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * inputs + k[:, None]
    return tl.load(at) if EVEN else tl.load(at, mask=(k < inputs)[:, None], other=0.0)


@triton.jit
def gemm_kernel(
    x, codes, low, scales, outlier_weights, outlier_columns, bias, out, tokens, outputs, inputs, columns, share,
    FORMAT: tl.constexpr, EPILOGUE: tl.constexpr, EARLY: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [M, K]; out [splits, M, N]: a split has `share` inputs, a multiple of BLOCK_K. EVEN: so are all of them."""
    begin(EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row, real = n.to(tl.int64), n < outputs
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N], 1.0, tl.float32)
    for first in range(split * share, tl.minimum(inputs, (split + 1) * share), BLOCK_K):
        if FORMAT == 2 or FORMAT == 4:
            word = first // 8 + tl.arange(0, BLOCK_K // 8)
            words, rest = packed_words(codes, low, row, word, real, columns, FORMAT)
            scale = group_scales(scales, row, first, real, columns, BLOCK_K // 32)
            for i in tl.static_range(8):
                w = packed_code(words, rest, i, FORMAT)
                w = grouped(w, scale * packed_unit(i, FORMAT), BLOCK_N, BLOCK_K // 32, 4)
                part = _input_tile(x, token, tokens, packed_column(word, i), inputs, EVEN)
                acc += dot(w.to(part.dtype), part, UPCAST)
        else:
            k = first + tl.arange(0, BLOCK_K)
            w = byte_tile(codes, scales, row, ones, first, real, inputs, columns, FORMAT, BLOCK_N, BLOCK_K)
            part = _input_tile(x, token, tokens, k, inputs, EVEN)
            acc += dot(w.to(part.dtype), part, UPCAST)
    if FORMAT == 4 and split == 0:
        place = tl.arange(0, 16)
        column = tl.load(outlier_columns + place)
        w = tl.load(outlier_weights + row[:, None] * 16 + place[None, :], mask=real[:, None], other=0.0)
        held = (column >= 0)[:, None] & (token < tokens)[None, :]
        chosen = tl.load(x + token.to(tl.int64)[None, :] * inputs + column[:, None], mask=held, other=0.0)
        acc += dot(w.to(chosen.dtype), chosen, UPCAST)
    out += split.to(tl.int64) * tokens * outputs
    _finish(acc, bias, out, n, token, outputs, tokens, EPILOGUE)


@triton.jit
def dequantize_kernel(
    codes, low, scales, outlier_weights, outlier_columns, out, rows, width, columns,
    FORMAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A stored matrix [rows, width] as plain numbers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_C
    real = row < rows
    line = out + row[:, None] * width
    if FORMAT == 2 or FORMAT == 4:
        word = first // 8 + tl.arange(0, BLOCK_C // 8)
        words, rest = packed_words(codes, low, row, word, real, columns, FORMAT)
        scale = group_scales(scales, row, first, real, columns, BLOCK_C // 32)
        for i in tl.static_range(8):
            factor = scale * packed_unit(i, FORMAT)
            w = grouped(packed_code(words, rest, i, FORMAT), factor, BLOCK_R, BLOCK_C // 32, 4)
            column = packed_column(word, i)
            if FORMAT == 4:
                for place in range(16):
                    chosen = tl.load(outlier_columns + place)
                    kept = tl.load(outlier_weights + row * 16 + place, mask=real, other=0.0).to(tl.float32)
                    w = tl.where((column == chosen)[None, :], kept[:, None], w)
            tl.store(line + column[None, :], w.to(out.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])
    else:
        column = first + tl.arange(0, BLOCK_C)
        ones = tl.full([BLOCK_R], 1.0, tl.float32)
        w = byte_tile(codes, scales, row, ones, first, real, width, columns, FORMAT, BLOCK_R, BLOCK_C)
        tl.store(line + column[None, :], w.to(out.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])


# The sizes below come from sweeps over the 8B's matrices on an H200 (docs/LOG.md): for each format the fastest of its
# largest matrix, or near it.


def gemv_tiles(matrix_format: int, inputs: int) -> dict[str, int]:
    """Tile sizes of gemv: rows, and 1 or 2 KiB of each a step. Few rows, as small matrices need many programs."""
    rows, wide = {PLAIN: (2, 1024), INT8: (4, 2048), FP8: (4, 2048), INT4: (8, 2048), PLANES: (8, 2048)}[matrix_format]
    return {"BLOCK_N": tile(rows, 1024), "BLOCK_K": min(tile(wide, 4096), max(64, power_of_two(inputs)))}


def gemm_tiles(matrix_format: int, tokens: int, inputs: int) -> dict[str, int]:
    """Tile sizes of gemm, and how many steps of loads run ahead."""
    width = max(16, min(power_of_two(tokens), 64))
    if width == 32 and matrix_format in (INT8, FP8):
        width = 64  # a step of 64 rows was faster than one of 32 with tiles of 32 (docs/gpu.md: q8 9.2 and 11.0 ms)
    rows, deep, warps = (64, 256, 4) if width == 16 else (64, 128, 4)
    if width > 16 and matrix_format in (INT4, PLANES):
        rows, warps = 128, 8
    sizes = {"BLOCK_N": tile(rows, 512), "BLOCK_M": width}
    sizes |= {"BLOCK_K": min(tile(deep, 1024), max(128, power_of_two(inputs)))}
    return sizes | {"num_warps": warps, "num_stages": 3 if matrix_format == INT4 else 4}


def dequantize_tiles(matrix_format: int) -> dict[str, int]:
    """Tile sizes of dequantize."""
    rows, columns, warps = (4, 256, 8) if matrix_format in (INT4, PLANES) else (1, 1024, 4)
    return {"BLOCK_R": tile(rows, 1024), "BLOCK_C": tile(columns, 1024), "num_warps": warps}


def multiply(
    x: Tensor,
    matrix: Matrix,
    bias: Tensor | None = None,
    *,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X [M, K] times a row-major matrix + bias [N] float32, then relu(.)^2 if asked: [M, N] in `dtype`, default x's.

    M up to MOST_TOKENS. A neuron-major matrix is for sparse_mlp.down.
    """
    epilogue = SQUARED_RELU if squared_relu else BIAS if bias is not None else NOTHING
    return _launch(x, matrix, bias, epilogue, 1, dtype or x.dtype)[0]


def multiply_in_parts(x: Tensor, matrix: Matrix, processors: int) -> Tensor:
    """X [M, K] times a row-major matrix as float32 partial sums [P, M, N]: enough for all processors."""
    return _launch(x, matrix, None, NOTHING, splits_for(x.shape[0], matrix, processors), torch.float32)


def splits_for(tokens: int, matrix: Matrix, processors: int) -> int:
    """Ranges of inputs, so that every processor has a program of gemm; at most MOST_PARTS, of whole steps."""
    if tokens == 1:
        return 1
    tiles = gemm_tiles(matrix.format, tokens, matrix.inputs)
    steps = ceil_div(matrix.inputs, tiles["BLOCK_K"])
    return max(1, min(MOST_PARTS, steps, processors // ceil_div(matrix.outputs, tiles["BLOCK_N"])))


def _launch(x: Tensor, matrix: Matrix, bias: Tensor | None, epilogue: int, splits: int, dtype: torch.dtype) -> Tensor:
    """Gemv or gemm, by the number of tokens: [splits, M, N]."""
    assert x.is_contiguous() and x.shape[1] == matrix.inputs, "x is [tokens, inputs]"
    assert not matrix.neuron_major, "rows are outputs"
    tokens = x.shape[0]
    assert tokens == 1 or matrix.format != PLAIN, "a library multiplies plain weights by several tokens"
    out = torch.empty(splits, tokens, matrix.outputs, dtype=dtype, device=x.device)
    parts = (
        matrix.codes, _or(matrix.low, x), _or(matrix.scales, x), _or(matrix.outlier_weights, x),
        _or(matrix.outlier_columns, x), _or(bias, x), out,
    )  # fmt: skip
    if tokens == 1:
        tiles = gemv_tiles(matrix.format, matrix.inputs)
        gemv_kernel[(ceil_div(matrix.outputs, tiles["BLOCK_N"]),)](
            x, *parts, matrix.outputs, matrix.inputs, matrix.columns, FORMAT=matrix.format, EPILOGUE=epilogue,
            **early(x.device), **tiles,
        )  # fmt: skip
        return out
    tiles = gemm_tiles(matrix.format, tokens, matrix.inputs)
    share = ceil_div(ceil_div(matrix.inputs, splits), tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    grid = (ceil_div(matrix.outputs, tiles["BLOCK_N"]), ceil_div(tokens, tiles["BLOCK_M"]), splits)
    gemm_kernel[grid](
        x, *parts, tokens, matrix.outputs, matrix.inputs, matrix.columns, share, FORMAT=matrix.format,
        EPILOGUE=epilogue, UPCAST=INTERPRETED, EVEN=matrix.inputs % tiles["BLOCK_K"] == 0, **early(x.device), **tiles,
    )  # fmt: skip
    return out


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Kernels take a pointer for every argument; those of other formats are never read."""
    return unused if tensor is None else tensor


def dequantize(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The stored matrix as plain numbers: [N, K], or [K, N] where it is neuron-major. PLAIN comes back itself."""
    if matrix.format == PLAIN:
        return matrix.codes
    rows, width = matrix.stored_shape
    out = torch.empty(rows, width, dtype=dtype, device=matrix.codes.device)
    tiles = dequantize_tiles(matrix.format)
    dequantize_kernel[(ceil_div(rows, tiles["BLOCK_R"]), ceil_div(width, tiles["BLOCK_C"]))](
        matrix.codes, _or(matrix.low, out), _or(matrix.scales, out), _or(matrix.outlier_weights, out),
        _or(matrix.outlier_columns, out), out, rows, width, matrix.columns, FORMAT=matrix.format, **tiles,
    )  # fmt: skip
    return out
