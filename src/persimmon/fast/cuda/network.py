"""One pass over the layers: the kernels in order, for any mix of decoding rows and pieces of prompts.

Shapes as in model.py; T tokens of all rows laid end to end, those of short pieces first. Short pieces attend with the
split-KV kernel, token by token; a prompt's long piece attends with the library's fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from persimmon.fast.cuda.choice import KernelTable
from persimmon.fast.cuda.kernels.attention import decode_attention, gather, num_splits
from persimmon.fast.cuda.kernels.cache_write import cache_write
from persimmon.fast.cuda.kernels.matmul import MOST_TOKENS, dequantize, multiply, multiply_in_parts
from persimmon.fast.cuda.kernels.norm import bias_squared_relu, residual_layer_norm
from persimmon.fast.cuda.kernels.sparse_mlp import (
    MOST_ACTIVE_TOKENS,
    down,
    down_splits,
    outlier_mask,
    progressive_up,
)
from persimmon.fast.cuda.layouts import PLAIN, PLANES, Matrix
from persimmon.fast.cuda.plan import GATHER_BYTES
from persimmon.fast.cuda.pool import LayerCache, Pool
from persimmon.fast.cuda.weights import Layer, Norm, Weights

SHORT_PIECE = 16
"""Tokens of a sequence that the decode kernel takes; longer pieces read their keys once for all. Not measured."""

ARRIVALS = 1 << 16
"""Counters of kernels whose last program joins what the others wrote: more than any of their grids has tiles."""


@dataclass(frozen=True)
class LongPiece:
    """A prompt's piece among the tokens of a pass."""

    first: int
    """Its first token in the pass."""
    count: int
    row: int
    """Its row in the block tables."""
    before: int
    """Tokens of the sequence that are stored already."""
    base: int | None
    """First slot of the sequence where its blocks follow each other."""


@dataclass(frozen=True)
class Pass:
    """Tokens of a pass, on the device."""

    ids: Tensor
    """[T] int32."""
    positions: Tensor
    """[T] int32."""
    rows: Tensor
    """[T] int32: each token's row in `tables`."""
    tables: Tensor
    """[rows, blocks] int32."""
    paged: bool
    """False: the blocks of every row follow each other."""
    num_short: int
    """Leading tokens that are no part of long pieces."""
    long: Sequence[LongPiece] = ()


class Network:
    """Weights, and which kernels run on them."""

    def __init__(self, weights: Weights, table: KernelTable, margin: float = math.inf) -> None:
        """margin: of the p44 up projection, where it runs sparse (kernels/sparse_mlp.py); inf is exact."""
        self.weights, self._table, self._margin = weights, table, margin
        device = weights.device
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )
        self._arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        self._attention_biases = [layer.query_key_value_bias.to(weights.dtype) for layer in weights.layers]
        self._outliers = [outlier_mask(la.up) if la.up.format == PLANES else None for la in weights.layers]

    def features(self, work: Pass, pool: Pool) -> Tensor:
        """Final hidden states [T, H]; keys and values of the tokens are stored."""
        x = self.weights.embedding.index_select(0, work.ids).float()
        partial, bias = None, None
        for index, (layer, cache) in enumerate(zip(self.weights.layers, pool.layers, strict=True)):
            normed = self._norm(x, partial, bias, layer.input_norm)
            fused = self._product(normed, layer.query_key_value, layer.query_key_value_bias, index)
            partial = self._attend(fused, layer, cache, work, pool)
            normed = self._norm(x, partial, layer.dense_bias, layer.post_norm)
            partial, bias = self._mlp(normed, layer, index), layer.down_bias
        return self._norm(x, partial, bias, self.weights.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head over hidden [T, H]: [T, V] float32."""
        return self._product(hidden, self.weights.head, None, None, torch.float32)

    def _norm(self, x: Tensor, partial: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
        eps = self.weights.config.layer_norm_eps
        return residual_layer_norm(x, partial, bias, norm.weight, norm.bias, eps, self.weights.dtype)

    def _by_library(self, tokens: int, matrix: Matrix) -> bool:
        """A library multiplies plain weights from two tokens on, and unpacked ones for many."""
        return tokens > (1 if matrix.format == PLAIN else MOST_TOKENS)

    def _product(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, layer: int | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """X times a row-major matrix, plus bias, in `dtype`: the activations', or float32 without a bias."""
        if not self._by_library(x.shape[0], matrix):
            return multiply(x, matrix, bias, dtype=dtype)
        plain = dequantize(matrix, x.dtype)
        if dtype is torch.float32:
            return _float32_product(x, plain.T)
        return F.linear(x, plain, None if bias is None or layer is None else self._attention_biases[layer])

    def _partial_product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """X [T, K] times a row-major matrix: partial sums [P, T, N] float32."""
        if not self._by_library(x.shape[0], matrix):
            return multiply_in_parts(x, matrix, self._processors)
        return _float32_product(x, dequantize(matrix, x.dtype).T)[None]

    # -- attention -----------------------------------------------------------------------------------------------

    def _attend(self, fused: Tensor, layer: Layer, cache: LayerCache, work: Pass, pool: Pool) -> Tensor:
        """Attention of the whole pass and its output projection, partial sums [P, T, H] without bias."""
        config, tokens = self.weights.config, fused.shape[0]
        shape = (tokens, config.num_heads, config.head_dim)
        q = torch.empty(shape, dtype=self.weights.dtype, device=fused.device)
        cache_write(
            fused, layer.qk_norms, self.weights.rotary, work.positions, work.rows, work.tables, cache.keys,
            cache.values, cache.scales, config.layer_norm_eps, pool.block_size, work.paged, q,
        )  # fmt: skip
        parts = []
        if short := work.num_short:
            splits = num_splits(short, config.num_heads, self._processors)
            parts.append(decode_attention(
                q[:short], cache.keys, cache.values, cache.scales, work.positions, work.rows, work.tables,
                pool.block_size, work.paged, splits, self._arrivals,
            ))  # fmt: skip
        parts += [self._attend_long(q[p.first : p.first + p.count], cache, work, p, pool) for p in work.long]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._partial_product(attended.view(tokens, -1), layer.dense)

    def _attend_long(self, q: Tensor, cache: LayerCache, work: Pass, piece: LongPiece, pool: Pool) -> Tensor:
        """A prompt's piece q [T, N, D] to its sequence, a group of heads at a time."""
        length, (_, heads, dim) = piece.before + piece.count, q.shape
        mask = causal_lower_right(piece.count, length)
        in_place = piece.base is not None and cache.scales is None and cache.keys.dtype == q.dtype
        group = heads if in_place else max(1, min(heads, GATHER_BYTES // (length * dim * q.element_size())))
        out = torch.empty_like(q)
        for start in range(0, heads, group):
            chosen = range(start, min(start + group, heads))
            keys, values = (self._stored(cache, which, work, piece, pool, chosen, q.dtype) for which in (0, 1))
            mine = q[:, start : chosen.stop].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(mine, keys, values, attn_mask=mask)
            out[:, start : chosen.stop] = attended[0].transpose(0, 1)
        return out

    def _stored(
        self, cache: LayerCache, which: int, work: Pass, piece: LongPiece, pool: Pool, heads: range, dtype: torch.dtype
    ) -> Tensor:
        """Keys (0) or values (1) of a sequence, [1, heads, S, D]: the pool itself where it serves."""
        length = piece.before + piece.count
        stored = (cache.keys, cache.values)[which]
        if piece.base is not None and cache.scales is None and stored.dtype == dtype:
            found = stored[piece.base : piece.base + length, heads.start : heads.stop]
        else:
            scales = None if cache.scales is None else cache.scales[which]
            found = gather(stored, scales, work.tables[piece.row], length, heads, pool.block_size, dtype)
        return found.transpose(0, 1)[None]

    # -- MLP -----------------------------------------------------------------------------------------------------

    def _mlp(self, x: Tensor, layer: Layer, index: int) -> Tensor:
        """Partial sums [P, T, H] of the MLP of x [T, H], without bias."""
        skip = self.runs_sparse(x.shape[0])
        hidden = self.hidden(x, layer, self._outliers[index] if skip else None)
        return self._down(hidden, layer.down, skip)

    def hidden(self, x: Tensor, layer: Layer, outliers: Tensor | None = None) -> Tensor:
        """relu(.)^2 of the up projection [T, F]; with `outliers` one token reads the low plane where it must."""
        tokens = x.shape[0]
        if outliers is not None and tokens == 1:
            return progressive_up(x, layer.up, outliers, layer.up_bias, self._margin)[0]
        if not self._by_library(tokens, layer.up):
            return multiply(x, layer.up, layer.up_bias, squared_relu=True)
        up = dequantize(layer.up, x.dtype).T
        # A prompt's sums are rounded before the bias: in float32 they would cross memory at twice the bytes.
        product = _float32_product(x, up) if tokens <= MOST_TOKENS else x @ up
        return bias_squared_relu(product, layer.up_bias, x.dtype)

    def _down(self, hidden: Tensor, matrix: Matrix, skip: bool) -> Tensor:
        """The down projection of hidden values [T, F]: partial sums [P, T, H]."""
        tokens = hidden.shape[0]
        if not matrix.neuron_major:
            return self._partial_product(hidden, matrix)
        if skip or not self._by_library(tokens, matrix):
            return down(hidden, matrix, down_splits(tokens, matrix, self._processors), self._arrivals, skip=skip)[None]
        return _float32_product(hidden, dequantize(matrix, hidden.dtype))[None]

    def runs_sparse(self, tokens: int) -> bool:
        """Whether a pass of so many tokens skips inactive neurons."""
        possible = tokens <= MOST_ACTIVE_TOKENS and self.weights.layers[0].down.neuron_major
        return possible and self._table.sparse(self.weights.format, tokens)


def _float32_product(x: Tensor, matrix: Tensor) -> Tensor:
    """X [T, K] times a matrix [K, N] of its type by the library; its float32 sums, not rounded to that type."""
    if x.dtype is torch.float32:
        return x @ matrix
    if x.device.type == "cuda":
        return torch.mm(x, matrix, out_dtype=torch.float32)
    return x.float() @ matrix.float()  # the CPU's product has no such option
