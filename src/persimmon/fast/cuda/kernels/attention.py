"""Attention of single queries to a long cache, split over the keys (flash-decoding), and the gather for long prompts.

decode_attention  One program per (head, split, token): with 64 heads and one token there are too few (head, token)
                  pairs to fill a GPU, so the keys are cut into SPLITS ranges whose partial softmaxes `combine` joins.
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
from persimmon.fast.cuda.kernels.launch import ceil_div, power_of_two, tile


@triton.jit
def _slots(tables, row, offsets, live, table_stride, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """Slots of the positions `offsets` in a table row."""
    if PAGED:
        block = tl.load(tables + row * table_stride + offsets // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        return block * BLOCK_SIZE + offsets % BLOCK_SIZE
    return tl.load(tables + row * table_stride).to(tl.int64) * BLOCK_SIZE + offsets


@triton.jit
def decode_attention_kernel(
    q, k_cache, v_cache, k_scales, v_scales, positions, rows, tables, out, partial, statistics, table_stride, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q [T, N, D]; out [T, N, D] when SPLITS is 1, else partial [T, N, SPLITS, D] and statistics [T, N, SPLITS, 2]."""
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
    for first in range(start, end, BLOCK_N):
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


@triton.jit
def combine_kernel(
    partial, statistics, out, num_pairs,
    DIM: tl.constexpr, SPLITS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the partial softmaxes of a (token, head) pair. A split without keys has statistics -inf and 0."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    live = pair < num_pairs
    dim = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (dim < DIM)[None, :]
    place = pair.to(tl.int64) * SPLITS
    largest = tl.load(statistics + place * 2, mask=live, other=0.0)  # the first split always has keys
    for split in tl.static_range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(statistics + (place + split) * 2, mask=live, other=0.0))
    total = tl.zeros([PAIRS], tl.float32)
    acc = tl.zeros([PAIRS, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(statistics + (place + split) * 2, mask=live, other=0.0) - largest)
        total += weight * tl.load(statistics + (place + split) * 2 + 1, mask=live, other=1.0)
        part = tl.load(partial + (place + split)[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * part
    at = pair.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


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
    """Compile-time tile sizes of decode_attention. Not measured."""
    return {"BLOCK_N": tile(128, 2048), "BLOCK_D": power_of_two(head_dim)}


def combine_tiles(head_dim: int) -> dict[str, int]:
    """Compile-time tile sizes of combine."""
    return {"PAIRS": tile(4, 4096), "BLOCK_D": power_of_two(head_dim)}


def gather_tiles(head_dim: int) -> dict[str, int]:
    """Compile-time tile sizes of gather."""
    return {"PAIRS": tile(32, 32_768), "BLOCK_D": power_of_two(head_dim)}


def num_splits(tokens: int, heads: int, processors: int) -> int:
    """Ranges of keys: about four programs per multiprocessor, a power of two from 1 to 16. Not measured."""
    return min(16, power_of_two(max(1, 4 * processors // (tokens * heads))))


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None, positions: Tensor, rows: Tensor,
    tables: Tensor, block_size: int, paged: bool, splits: int,
) -> Tensor:  # fmt: skip
    """Attention of q [T, N, D] to the cache, each token up to its own position: [T, N, D]; scale 1/sqrt(D)."""
    tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    shape = (tokens, heads, splits) if splits > 1 else (1, 1, 1)
    partial = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    k_scales, v_scales = scales or (statistics, statistics)
    decode_attention_kernel[(heads, splits, tokens)](
        q, keys, values, k_scales, v_scales, positions, rows, tables, out, partial, statistics, tables.stride(0),
        dim**-0.5, HEADS=heads, DIM=dim, SPLITS=splits, BLOCK_SIZE=block_size, PAGED=paged, FORMAT=cache_format(keys),
        **attention_tiles(dim),
    )  # fmt: skip
    if splits > 1:
        tiles = combine_tiles(dim)
        combine_kernel[(ceil_div(tokens * heads, tiles["PAIRS"]),)](
            partial, statistics, out, tokens * heads, DIM=dim, SPLITS=splits, **tiles
        )
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
