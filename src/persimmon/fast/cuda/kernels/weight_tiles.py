"""Stored weights as tiles of float32 numbers, for the kernels that multiply by them or unpack them.

Stored rows (`layouts.py`): `codes` [rows, columns]; groups of 32 along a row share a float16 scale.
    PLAIN   bfloat16 or float32
    INT8    w = code * scale
    INT4    eight codes a word, w = (nibble - 8) * scale; bits 4 i of word j (0 .. 3) of a group hold its column
            4 i + j: a group is 16 bytes, which a thread loads at once and sums up by itself
    FP8     w = e4m3 code * scale of the stored row (float32)
    PLANES  two INT4 arrays, w = (16 high + low - 128) * scale; 16 input columns apart in float16, where the planes
            hold 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from persimmon.fast.cuda.kernels.launch import INTERPRETED

_ASSEMBLY = tl.constexpr(not INTERPRETED)


@triton.jit
def _composed(words, MASK: tl.constexpr):
    """Bits of `words` under a mask, in the last bits of 2^23, as float32."""
    if _ASSEMBLY:  # one instruction, where the compiler takes two
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x4B000000, 0xEA;", "=r,r,r", [words, MASK], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = (words & MASK) | 0x4B000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def packed_code(words, low, PLACE: tl.constexpr, FORMAT: tl.constexpr):
    """Code PLACE of the 8 in int32 words of INT4, or of both PLANES: around zero, and divided by `packed_unit`.

    2^23 + n has n in its last bits: composing that float32 where the code lies and subtracting takes a third of the
    instructions of shifting and converting. The upper half is moved down first, below the exponent.
    """
    if FORMAT == 2:
        number = _composed(words >> 16 if PLACE >= 4 else words, 15 << (4 * (PLACE % 4)))
        center = 8388608.0 + 8.0 * 16 ** (PLACE % 4)
    else:  # of two planes, four bytes a word: first those of the even places, or of the odd ones
        even = ((words & 0x0F0F0F0F) << 4) | (low & 0x0F0F0F0F)
        odd = (words & -252645136) | ((low >> 4) & 0x0F0F0F0F)  # 0xF0F0F0F0
        joined = odd if PLACE % 2 else even
        number = _composed(joined >> 16 if PLACE >= 4 else joined, 255 << (8 * (PLACE // 2 % 2)))
        center = 8388608.0 + 128.0 * 256 ** (PLACE // 2 % 2)
    return number - center


@triton.jit
def packed_unit(PLACE: tl.constexpr, FORMAT: tl.constexpr):
    """What `packed_code` has to be multiplied by: a power of two."""
    if FORMAT == 2:
        return 1.0 / 16 ** (PLACE % 4)
    else:
        return 1.0 / 256 ** (PLACE // 2 % 2)


@triton.jit
def packed_column(word, PLACE: tl.constexpr):
    """The column of code PLACE of the word `word` of a row."""
    return word // 4 * 32 + word % 4 + 4 * PLACE


@triton.jit
def packed_words(codes, low, row, word, real, columns, FORMAT: tl.constexpr):
    """Words of INT4 rows twice, or of both PLANES."""
    at = row[:, None] * (columns // 8) + word[None, :]
    held = real[:, None] & (word < columns // 8)[None, :]
    words = tl.load(codes + at, mask=held, other=0)
    if FORMAT == 4:
        return words, tl.load(low + at, mask=held, other=0)
    return words, words


@triton.jit
def group_scales(scales, row, first, real, columns, GROUPS: tl.constexpr):
    """Scales [rows, GROUPS] of the groups from the column `first` on, as float32."""
    group = first // 32 + tl.arange(0, GROUPS)
    held = real[:, None] & (group < columns // 32)[None, :]
    return tl.load(scales + row[:, None] * (columns // 32) + group[None, :], mask=held, other=0.0).to(tl.float32)


@triton.jit
def grouped(tile, scale, ROWS: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """Tile [ROWS, GROUPS * EACH] times the scales [ROWS, GROUPS] of its groups."""
    return tl.reshape(tl.reshape(tile, (ROWS, GROUPS, EACH)) * scale[:, :, None], (ROWS, GROUPS * EACH))


@triton.jit
def byte_tile(
    codes, scales, row, factor, first, real, width, columns,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights [ROWS, COLUMNS] of a PLAIN, FP8 or INT8 matrix from the column `first` on, a multiple of 32, as float32.

    Each row times its factor [ROWS].
    """
    column = first + tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < width)[None, :]
    stored = codes + row[:, None] * columns + column[None, :]
    if FORMAT == 1:
        w = tl.load(stored, mask=inside, other=0).to(tl.float32)
        scale = group_scales(scales, row, first, real, columns, COLUMNS // 32) * factor[:, None]
        return grouped(w, scale, ROWS, COLUMNS // 32, 32)
    if FORMAT == 3:
        factor *= tl.load(scales + row, mask=real, other=0.0)
    return tl.load(stored, mask=inside, other=0.0).to(tl.float32) * factor[:, None]


@triton.jit
def outlier_products(x, weights, columns, row, real):
    """The 16 input columns of a PLANES matrix that are stored apart."""
    place = tl.arange(0, 16)
    column = tl.load(columns + place)
    inputs = tl.load(x + column, mask=column >= 0, other=0.0).to(tl.float32)
    w = tl.load(weights + row[:, None] * 16 + place[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    return tl.sum(w * inputs[None, :], axis=1)
