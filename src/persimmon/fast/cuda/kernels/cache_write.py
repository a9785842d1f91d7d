"""From the fused projection to queries and a longer cache: QK LayerNorm, partial rotary, quantization and the write.

One read of the fused projection [T, heads, 3, head_dim] gives the queries and puts keys and values where they belong;
written as separate steps the same numbers would cross memory four times.

Cache layout: [slots, heads, head_dim], a slot being one token, `block_size` slots a block. Slots of a token are
contiguous, so a sequence whose blocks follow each other is a plain [tokens, heads, head_dim] array that a library's
attention reads in place. Token t of the call belongs to row `rows[t]` of the block tables and stands at `positions[t]`.

Rotation: dimension i of a half-split pair needs its partner i +- R/2. The partner is loaded a second time (from the L1
cache) and normalised with the same statistics, so that no shuffles are needed: out = n * cos + partner * (-+ sin).
Rounding: everything is float32 until the stores. The tables hold what `model.rotary_tables` gives, in either rotary
precision; the reference in bfloat16 rounds between the steps and this does not.
int8 / fp8 cache: one float32 scale per token, head, and key or value: largest magnitude / 127, or / 448 (e4m3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import begin, ceil_div, early, power_of_two, tile

PLAIN, INT8, FP8 = 0, 1, 2
"""Formats of the cache."""


@triton.jit
def token_slot(tables, row, position, table_stride, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """Where the token at `position` of a table row lies; not PAGED: the row's blocks follow its first."""
    if PAGED:
        block = tl.load(tables + row.to(tl.int64) * table_stride + position // BLOCK_SIZE).to(tl.int64)
        return block * BLOCK_SIZE + position % BLOCK_SIZE
    return tl.load(tables + row.to(tl.int64) * table_stride).to(tl.int64) * BLOCK_SIZE + position


@triton.jit
def _rotated(
    fused, weight, bias, cos, sin, at, dim, partner, position, inside, eps,
    DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """LayerNorm and rotary of heads [P, D] that begin at `at` [P]."""
    x = tl.load(fused + at[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(fused + at[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    real = dim < DIM
    if NORM:
        mean = tl.sum(x, axis=1) / DIM
        centred = tl.where(inside, x - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, axis=1) / DIM + eps)
        gain = tl.load(weight + dim, mask=real, other=0.0)
        shift = tl.load(bias + dim, mask=real, other=0.0)
        partner_gain = tl.load(weight + partner, mask=real, other=0.0)
        partner_shift = tl.load(bias + partner, mask=real, other=0.0)
        x = centred / deviation[:, None] * gain[None, :] + shift[None, :]
        y = (y - mean[:, None]) / deviation[:, None] * partner_gain[None, :] + partner_shift[None, :]
    HALF: tl.constexpr = ROTARY // 2
    turns = inside & (dim < ROTARY)[None, :]
    angle = position.to(tl.int64)[:, None] * HALF + (dim % HALF)[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    return x * c + y * tl.where((dim < HALF)[None, :], -s, s)


@triton.jit
def _store_quantized(cache, scales, pair, values, dim, inside, live, DIM: tl.constexpr, FORMAT: tl.constexpr):
    """Heads [P, D] of keys or values into the cache; `pair` is slot * heads + head."""
    at = pair[:, None] * DIM + dim[None, :]
    if FORMAT == 0:
        tl.store(cache + at, values.to(cache.dtype.element_ty), mask=inside)
    else:
        largest = tl.max(tl.where(inside, tl.abs(values), 0.0), axis=1)
        scale = largest / 127.0 if FORMAT == 1 else largest / 448.0
        codes = values * tl.where(largest > 0.0, 1.0 / tl.where(largest > 0.0, scale, 1.0), 0.0)[:, None]
        if FORMAT == 1:
            codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5), -127.0), 127.0)
        else:
            codes = tl.minimum(tl.maximum(codes, -448.0), 448.0)
        tl.store(cache + at, codes.to(cache.dtype.element_ty), mask=inside)
        tl.store(scales + pair, scale, mask=live)


@triton.jit
def cache_write_kernel(
    fused, q_weight, q_bias, k_weight, k_bias, cos, sin, positions, rows, tables,
    q_out, k_cache, v_cache, k_scales, v_scales, num_pairs, table_stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, FORMAT: tl.constexpr, EARLY: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """PAIRS (token, head) pairs per program."""
    begin(EARLY)
    number = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    live = number < num_pairs
    number = tl.where(live, number, 0)
    token, head = number // HEADS, number % HEADS
    dim = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = ROTARY // 2
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < ROTARY, dim - HALF, dim))
    inside = live[:, None] & (dim < DIM)[None, :]
    position = tl.load(positions + token)
    at = number.to(tl.int64) * (3 * DIM)
    query = _rotated(fused, q_weight, q_bias, cos, sin, at, dim, partner, position, inside, eps, DIM, ROTARY, NORM)
    target = number.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(q_out + target, query.to(q_out.dtype.element_ty), mask=inside)
    key = _rotated(fused, k_weight, k_bias, cos, sin, at + DIM, dim, partner, position, inside, eps, DIM, ROTARY, NORM)
    value = tl.load(fused + at[:, None] + 2 * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    slot = token_slot(tables, tl.load(rows + token), position, table_stride, BLOCK_SIZE, PAGED)
    pair = slot * HEADS + head
    _store_quantized(k_cache, k_scales, pair, key, dim, inside, live, DIM, FORMAT)
    _store_quantized(v_cache, v_scales, pair, value, dim, inside, live, DIM, FORMAT)


def cache_write_tiles(head_dim: int) -> dict[str, int]:
    """Compile-time tile sizes of cache_write."""
    return {"PAIRS": tile(8, 4096), "BLOCK_D": power_of_two(head_dim)}


def cache_write(
    fused: Tensor, norms: tuple[Tensor, Tensor, Tensor, Tensor] | None, rotary: tuple[Tensor, Tensor],
    positions: Tensor, rows: Tensor, tables: Tensor, keys: Tensor, values: Tensor,
    scales: tuple[Tensor, Tensor] | None, eps: float, block_size: int, paged: bool, out: Tensor,
) -> None:  # fmt: skip
    """Queries of fused [T, N * 3 * D] into out [T, N, D], keys and values into the cache [slots, N, D].

    norms: weight and bias for queries, then for keys, [D] float32 each; None where the model has none.
    rotary: cos and sin [positions, R / 2]. positions, rows [T] and tables [rows, blocks] are int32.
    scales: of keys and values, [slots, N] float32, for a quantized cache.
    """
    tokens, heads, dim = out.shape
    cos, sin = rotary
    tiles = cache_write_tiles(dim)
    weights = norms or (cos, cos, cos, cos)
    k_scales, v_scales = scales or (cos, cos)
    cache_write_kernel[(ceil_div(tokens * heads, tiles["PAIRS"]),)](
        fused, *weights, cos, sin, positions, rows, tables, out, keys, values, k_scales, v_scales,
        tokens * heads, tables.stride(0), eps, HEADS=heads, DIM=dim, ROTARY=2 * cos.shape[1], NORM=norms is not None,
        BLOCK_SIZE=block_size, PAGED=paged, FORMAT=cache_format(keys),
        **early(fused.device), **tiles,
    )  # fmt: skip


def cache_format(keys: Tensor) -> int:
    """PLAIN, INT8 or FP8 of a cache tensor."""
    return {"torch.int8": INT8, "torch.float8_e4m3fn": FP8}.get(str(keys.dtype), PLAIN)
