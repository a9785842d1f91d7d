"""Codes and scales of packed rows as tensors (native/layout.h), for those who compute with PyTorch or Triton.

R rows of S superblocks of 256 weights; groups are 32 weights that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from persimmon.fast.cpu.formats import GROUP, SUPERBLOCK, row_bytes, top_parts


def cut_superblocks(rows: Tensor, size: int) -> Tensor:
    """Bytes [R, S * size] -> [R, S, size]."""
    return rows.view(rows.shape[0], -1, size)


def plain_order(codes: Tensor) -> Tensor:
    """Lane order [R, S, 256] -> plain order [R, 256 S]: byte 32 v + 4 g + b is weight 32 g + 4 v + b."""
    lanes = codes.reshape(codes.shape[0], -1, 8, 8, 4)
    return lanes.transpose(2, 3).reshape(codes.shape[0], -1)


def nibbles(blocks: Tensor) -> Tensor:
    """Bytes [R, S, 128] -> codes 0 .. 15 in plain order, uint8 [R, 256 S]."""
    return plain_order(torch.cat((blocks & 15, blocks >> 4), dim=-1))


def pairs(blocks: Tensor) -> Tensor:
    """Bytes [R, S, 64] -> codes 0 .. 3 in plain order, uint8 [R, 256 S]."""
    return plain_order(torch.cat([(blocks >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1))


def plane_codes(top: Tensor, rest: Tensor, inputs: int) -> Tensor:
    """Top rows and rest rows of planes (or rows that begin with them) -> int8 weights + 128, uint8 [R, 256 S]."""
    codes, _, _ = top_parts(inputs)
    first = pairs(cut_superblocks(top[:, :codes].contiguous(), SUPERBLOCK // 4))
    blocks = cut_superblocks(rest[:, : row_bytes("rest", inputs)].contiguous(), SUPERBLOCK * 3 // 4)
    middle, low = pairs(blocks[..., : SUPERBLOCK // 4]), nibbles(blocks[..., SUPERBLOCK // 4 :])
    return (first << 6) + (middle << 4) + low


def plane_scales(top: Tensor, inputs: int) -> Tensor:
    """Scales in top rows, float16 [R, 8 S], exactly: a unit is a power of two from 2^-24 on, times a byte."""
    start, outliers, unit = top_parts(inputs)
    units = top[:, unit : unit + 4].contiguous().view(torch.float32)
    return (top[:, start:outliers].float() * units).half()


def plane_outliers(top: Tensor, inputs: int) -> Tensor:
    """Weights of the outlier columns in top rows, float16 [R, 16]."""
    _, start, end = top_parts(inputs)
    return top[:, start:end].contiguous().view(torch.float16)


def half_scales(parts: Tensor) -> Tensor:
    """Bytes [R, S, 16] -> float16 [R, 8 S], one for each group."""
    return parts.contiguous().view(torch.float16).reshape(parts.shape[0], -1)


def record_parts(records: Tensor) -> tuple[Tensor, Tensor]:
    """q4 down records [R, bytes] -> codes 0 .. 15, uint8 [32 R neurons, outputs]; float16 scales [R, outputs]."""
    count, width = records.shape[0], records.shape[1] // (2 + GROUP // 2)
    rows = records[:, 2 * width :].reshape(count, GROUP, -1, 4, 4, 4)
    # record, neuron, piece, half, then plain order
    codes = torch.stack((rows & 15, rows >> 4), dim=3).transpose(4, 5).reshape(count * GROUP, width)
    return codes, records[:, : 2 * width].contiguous().view(torch.float16)
