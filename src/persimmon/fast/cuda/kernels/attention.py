"""Attention of single queries to a long cache, split over the keys (flash-decoding), and the gather for long prompts.

decode_attention  One program per (head, split, token): with 64 heads and one token there are too few (head, token)
                  pairs to fill a GPU, so the keys are cut into SPLITS ranges, and the program of a pair that ends last
                  joins the partial softmaxes, in their order.
                  Every token attends to the positions up to its own in its row of the block tables, so the same kernel
                  serves batches of any lengths and short chunks. Lengths are read on the device: a captured graph
                  stays valid while sequences grow.
gather            Keys and values of one sequence and a range of heads as plain [S, heads, D], dequantized, for the
                  library's attention over a prompt's chunk.

Keys are multiplied in float32 on the ordinary cores: a single query has no second row for a matrix unit, and reading
the cache is what takes the time. Rounding: the order of sums depends on SPLITS and BLOCK_N, not on the batch.
Not supported: fp8 on GPUs before compute capability 8.9; grouped heads (Persimmon has none).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.cache_write import cache_format
from persimmon.fast.cuda.kernels.launch import begin, ceil_div, early, is_last, power_of_two, tile


@triton.jit
def _slots(tables, row, offsets, live, table_stride, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """Slots of the positions `offsets` in a table row."""
    if PAGED:
        block = tl.load(tables + row * table_stride + offsets // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        return block * BLOCK_SIZE + offsets % BLOCK_SIZE
    return tl.load(tables + row * table_stride).to(tl.int64) * BLOCK_SIZE + offsets


@triton.jit
def decode_attention_kernel(
    q, k_cache, v_cache, k_scales, v_scales, positions, rows, tables, out, partial, statistics, arrivals,
    table_stride, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
    FORMAT: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q [T, N, D]; out [T, N, D]; when SPLITS is not 1, partial [T, N, SPLITS, D] and statistics [T, N, SPLITS, 2]."""
    begin(EARLY)
    head, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dim = tl.arange(0, BLOCK_D)
    real = dim < DIM
    pair = token.to(tl.int64) * HEADS + head
    query = tl.load(q + pair * DIM + dim, mask=real, other=0.0).to(tl.float32) * scale
    row = tl.load(rows + token).to(tl.int64)
    length = tl.load(positions + token) + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, length)
    largest = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offsets = first + tl.arange(0, BLOCK_N)
        live = offsets < end
        at = _slots(tables, row, offsets, live, table_stride, BLOCK_SIZE, PAGED) * HEADS + head
        inside = live[:, None] & real[None, :]
        keys = tl.load(k_cache + at[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], axis=1)
        if FORMAT > 0:
            scores *= tl.load(k_scales + at, mask=live, other=0.0)
        scores = tl.where(live, scores, -float("inf"))
        now = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp(scores - now)
        before = tl.exp(largest - now)
        total = total * before + tl.sum(weights, axis=0)
        if FORMAT > 0:
            weights *= tl.load(v_scales + at, mask=live, other=0.0)
        values = tl.load(v_cache + at[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        acc = acc * before + tl.sum(values * weights[:, None], axis=0)
        largest = now
    if SPLITS == 1:
        tl.store(out + pair * DIM + dim, (acc / total).to(out.dtype.element_ty), mask=real)
    else:
        place = pair * SPLITS + split
        tl.store(partial + place * DIM + dim, acc, mask=real)
        tl.store(statistics + place * 2, largest)
        tl.store(statistics + place * 2 + 1, total)
        if is_last(arrivals + pair, SPLITS):
            _join(partial, statistics, out, pair, DIM, SPLITS, BLOCK_D)


@triton.jit
def _join(partial, statistics, out, pair, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The partial softmaxes of a (token, head) pair. A split without keys has statistics -inf and 0."""
    place = pair * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_D)
    real = dim < DIM
    largest = tl.load(statistics + place * 2, cache_modifier=".cg")
    weight = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(statistics + place * 2 + 1, cache_modifier=".cg"), axis=0)
    at = partial + place[:, None] * DIM + dim[None, :]
    parts = tl.load(at, mask=real[None, :], other=0.0, cache_modifier=".cg")
    acc = tl.sum(weight[:, None] * parts, axis=0)
    tl.store(out + pair * DIM + dim, (acc / total).to(out.dtype.element_ty), mask=real)


@triton.jit
def gather_kernel(
    cache, scales, table, out, length, first_head, num_heads,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads first_head .. first_head + num_heads of positions 0 .. length of one sequence into out [S, heads, D]."""
    number = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    position, head = number // num_heads, number % num_heads + first_head
    live = position < length
    dim = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (dim < DIM)[None, :]
    block = tl.load(table + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    at = (block * BLOCK_SIZE + position % BLOCK_SIZE) * HEADS + head
    values = tl.load(cache + at[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if FORMAT > 0:
        values *= tl.load(scales + at, mask=live, other=0.0)[:, None]
    tl.store(out + number[:, None] * DIM + dim[None, :], values.to(out.dtype.element_ty), mask=inside)


def attention_tiles(head_dim: int) -> dict[str, int]:
    """Tile sizes of decode_attention, and the steps that loads run ahead: by a sweep, the fastest for bfloat16."""
    return {"BLOCK_N": tile(32, 2048), "BLOCK_D": power_of_two(head_dim), "STAGES": 2, "num_warps": 1}


def gather_tiles(head_dim: int) -> dict[str, int]:
    """Compile-time tile sizes of gather."""
    return {"PAIRS": tile(32, 32_768), "BLOCK_D": power_of_two(head_dim)}


def num_splits(tokens: int, heads: int, processors: int) -> int:
    """Ranges of keys: about eight programs per multiprocessor, a power of two from 1 to 16."""
    return min(16, power_of_two(max(1, 8 * processors // (tokens * heads))))


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None, positions: Tensor, rows: Tensor,
    tables: Tensor, block_size: int, paged: bool, splits: int, arrivals: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of q [T, N, D] to the cache, each token up to its own position: [T, N, D]; scale 1/sqrt(D).

    splits: a power of two. arrivals: at least T * N zeros, int32, which are zeros again afterwards.
    """
    tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    shape = (tokens, heads, splits) if splits > 1 else (1, 1, 1)
    partial = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    k_scales, v_scales = scales or (statistics, statistics)
    decode_attention_kernel[(heads, splits, tokens)](
        q, keys, values, k_scales, v_scales, positions, rows, tables, out, partial, statistics, arrivals,
        tables.stride(0), dim**-0.5, HEADS=heads, DIM=dim, SPLITS=splits, BLOCK_SIZE=block_size, PAGED=paged,
        FORMAT=cache_format(keys), **early(q.device), **attention_tiles(dim),
    )  # fmt: skip
    return out


def gather(
    cache: Tensor, scales: Tensor | None, table: Tensor, length: int, heads: range, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Positions 0 .. length of the sequence in the blocks `table` [blocks] int32: [length, heads, D] in `dtype`."""
    out = torch.empty(length, len(heads), cache.shape[2], dtype=dtype, device=cache.device)
    tiles = gather_tiles(cache.shape[2])
    gather_kernel[(ceil_div(length * len(heads), tiles["PAIRS"]),)](
        cache, cache if scales is None else scales, table, out, length, heads.start, len(heads), HEADS=cache.shape[1],
        DIM=cache.shape[2], BLOCK_SIZE=block_size, FORMAT=cache_format(cache), **tiles,
    )  # fmt: skip
    return out
