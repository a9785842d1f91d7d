"""Weight matrices as the GPU kernels read them, made from the packed formats or from plain numbers. torch, no triton.

The packed formats of the CPU engine (`fast/cpu/native/layout.h`) keep scales beside their codes and codes in the order
of its vector lanes. A GPU reads best when neighbouring threads read neighbouring bytes, so here codes are in plain
order and scales in an array of their own; the numbers are the same to the last bit. Nothing is quantized anew, but for
FP8, whose weights come from plain ones.

    q8 row          INT8: int8 codes, a float16 scale per 32
    q4 row          INT4: eight codes a word (kernels/weight_tiles.py); down records become such rows again
    head planes     INT8, put together again
    p44 hot, cold   PLANES for the up projection, int8 in 4 and 4 bits; INT8 neuron-major for the down projection
    plain           PLAIN: as it is; the down projection neuron-major

All of it is ordinary tensor arithmetic, so packing happens where the tensor lies, matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from persimmon.fast.cpu.formats import GROUP, SUPERBLOCK, row_bytes
from persimmon.fast.cpu.unpacking import (
    cut_superblocks,
    half_scales,
    nibbles,
    plain_order,
    plane_codes,
    plane_outliers,
    plane_scales,
    record_parts,
)

PLAIN, INT8, INT4, FP8, PLANES = 0, 1, 2, 3, 4
"""Formats of a matrix; the kernels compare numbers."""

_LARGEST_E4M3 = 448.0

_SLICE_ROWS = 16_384
"""Rows of the head that are unpacked at a time: 64 MiB of codes for the 8B."""

SLICE_NUMBERS = 16 << 20
"""Numbers that are converted at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that maps `inputs` to `outputs` numbers."""

    format: int
    outputs: int
    inputs: int
    neuron_major: bool
    """Stored [inputs, outputs]: a row per input, which is skipped when that input is zero."""
    codes: Tensor
    """PLAIN, INT8, FP8 [rows, columns]; INT4 and the high PLANES int32 [rows, columns / 8]."""
    scales: Tensor | None = None
    """float16 [rows, columns / 32]; FP8 float32 [rows]."""
    low: Tensor | None = None
    """Low PLANES."""
    outlier_weights: Tensor | None = None
    """PLANES: float16 [rows, 16] ..."""
    outlier_columns: Tensor | None = None
    """... of these input columns, int32 [16], -1 where there are fewer."""

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows, and columns without padding."""
        return (self.inputs, self.outputs) if self.neuron_major else (self.outputs, self.inputs)

    @property
    def columns(self) -> int:
        """Columns of a stored row, padding included."""
        return self.codes.shape[1] * (8 if self.format in (INT4, PLANES) else 1)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        parts = (self.codes, self.scales, self.low, self.outlier_weights, self.outlier_columns)
        return sum(part.nbytes for part in parts if part is not None)


def plain(weight: Tensor, *, neuron_major: bool = False) -> Matrix:
    """A hub matrix [outputs, inputs]; neuron-major turns it."""
    outputs, inputs = weight.shape
    return Matrix(PLAIN, outputs, inputs, neuron_major, (weight.T if neuron_major else weight).contiguous())


def fp8(weight: Tensor, *, neuron_major: bool = False) -> Matrix:
    """A hub matrix [outputs, inputs] rounded to e4m3, a float32 scale per stored row."""
    outputs, inputs = weight.shape
    stored = weight.T if neuron_major else weight
    codes = torch.empty(stored.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(stored.shape[0], device=weight.device)
    for part in row_slices(*stored.shape):
        rows = stored[part].float()
        scale = (rows.abs().amax(1) / _LARGEST_E4M3).clamp_min(torch.finfo(torch.float32).tiny)
        scales[part] = scale
        codes[part] = (rows / scale[:, None]).clamp_(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return Matrix(FP8, outputs, inputs, neuron_major, codes, scales)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in pieces of about SLICE_NUMBERS numbers, as converting takes several times their size."""
    step = max(1, SLICE_NUMBERS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def from_q8(rows: Tensor, inputs: int) -> Matrix:
    """Packed q8 rows, uint8 [outputs, bytes]."""
    blocks = cut_superblocks(rows, 272)
    codes = plain_order(blocks[..., :SUPERBLOCK]).view(torch.int8)
    width = _padded(inputs, GROUP)
    return Matrix(
        INT8, rows.shape[0], inputs, False, codes[:, :width].contiguous(), _scales(blocks[..., SUPERBLOCK:], width)
    )


def from_q4(rows: Tensor, inputs: int) -> Matrix:
    """Packed q4 rows, uint8 [outputs, bytes]."""
    blocks = cut_superblocks(rows, 144)
    width = _padded(inputs, GROUP)
    codes = _words(nibbles(blocks[..., :128])[:, :width])
    return Matrix(INT4, rows.shape[0], inputs, False, codes, _scales(blocks[..., 128:], width))


def from_records(records: Tensor, outputs: int, neurons: int) -> Matrix:
    """A packed q4 down projection, uint8 [records of 32 neurons, bytes], a row per output."""
    (rows, halves), width = record_parts(records), _padded(neurons, GROUP)
    codes = torch.full((outputs, width), 8, dtype=torch.uint8, device=records.device)
    codes[:, : len(rows)] = rows[:, :outputs].T
    scales = torch.zeros(outputs, width // GROUP, dtype=torch.float16, device=records.device)
    scales[:, : len(halves)] = halves[:, :outputs].T
    return Matrix(INT4, outputs, neurons, False, _words(codes), scales)


def from_head_planes(top: Tensor, rest: Tensor, inputs: int) -> Matrix:
    """The packed head's planes, joined to int8; in slices, as unpacking takes several times the size."""
    rows, width = top.shape[0], _padded(inputs, GROUP)
    codes = torch.empty(rows, width, dtype=torch.int8, device=top.device)
    scales = torch.empty(rows, width // GROUP, dtype=torch.float16, device=top.device)
    for start in range(0, rows, _SLICE_ROWS):
        part = slice(start, start + _SLICE_ROWS)
        joined = plane_codes(top[part], rest[part], inputs)
        codes[part] = (joined ^ 128).view(torch.int8)[:, :width]  # minus 128, modulo 256
        scales[part] = plane_scales(top[part], inputs)[:, : width // GROUP]
    return Matrix(INT8, rows, inputs, False, codes, scales)


def from_neurons(rows: Tensor, outputs: int) -> Matrix:
    """A packed q8 down projection, uint8 [neurons, bytes] in plain order."""
    blocks = cut_superblocks(rows, 272)
    width = _padded(outputs, GROUP)
    codes = blocks[..., :SUPERBLOCK].reshape(rows.shape[0], -1).view(torch.int8)
    return Matrix(
        INT8, outputs, rows.shape[0], True, codes[:, :width].contiguous(), _scales(blocks[..., SUPERBLOCK:], width)
    )


def from_p44(hot: Tensor, cold: Tensor, outlier_columns: Tensor, hidden: int) -> tuple[Matrix, Matrix]:
    """A packed p44 MLP: the up projection in planes and the down projection."""
    neurons, width = hot.shape[0], _padded(hidden, GROUP)
    codes = plane_codes(hot, cold, hidden)[:, :width]
    scales = plane_scales(hot, hidden)[:, : width // GROUP].contiguous()
    planes = _words(codes >> 4), _words(codes & 15)
    up = Matrix(
        PLANES, neurons, hidden, False, planes[0], scales, planes[1], plane_outliers(hot, hidden), outlier_columns
    )
    return up, from_neurons(cold[:, row_bytes("rest", hidden) :].contiguous(), hidden)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _words(codes: Tensor) -> Tensor:
    """Codes [R, 32 n] -> int32 [R, 4 n]: word j of a group has its columns j, 4 + j, ... from the low bits up."""
    groups = codes.view(codes.shape[0], -1, 8, 4)
    words = torch.zeros(groups.shape[0], groups.shape[1], 4, dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= groups[:, :, place].to(torch.int32) << (4 * place)
    return words.view(codes.shape[0], -1)


def _scales(parts: Tensor, width: int) -> Tensor:
    """[R, S, 16] bytes -> float16 [R, width / 32]."""
    return half_scales(parts)[:, : width // GROUP].contiguous()
