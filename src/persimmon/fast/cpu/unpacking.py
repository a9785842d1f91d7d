"""Codes and scales of packed rows as tensors (native/layout.h), for those who compute with PyTorch or Triton.

R rows of S superblocks of 256 weights; groups are 32 weights that share a float16 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from persimmon.fast.cpu.formats import GROUP


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
