"""The reference model over a cache of blocks, with logits that depend on nothing but the sequence's own tokens.

A matrix product may add in another order when it has more rows, so the same token in a larger batch, or in a prompt
that was cut elsewhere, would get slightly other logits; greedy answers then change with the load. Here every product
has a shape that is a function of the token's position alone:

* tokens run in tiles of exactly TILE rows, whoever they belong to, filled up with padding;
* a token at position p attends to `padded_keys(p)` keys, masked behind p, in a group of exactly TILE queries.

What a row of such a product gives does not depend on the other rows nor on which row it is;
tests/contract/test_paged_decoders.py holds this bit for bit, on the CPU in float32. So a request gets the same logits
alone and in a crowd, its prompt in one piece or many, after being sent back and read again, and from blocks that
another request computed. The price is that a lone token costs as much as TILE tokens, which on a CPU is little:
reading the weights dominates.

Shapes as in model.py: N heads, D head_dim, S keys; T is always TILE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.infer.decoder import Logits
from persimmon.infer.paged import PagedChunk
from persimmon.model import PersimmonModel

TILE = 16
"""Rows of every matrix product. Decoding 16 sequences costs as much as one; prompts are read 16 tokens at a time."""

_KEYS_STEP = 512
"""Keys are padded to powers of two up to here, and to multiples of it beyond (PyTorch's CPU attention block)."""


def padded_keys(position: int) -> int:
    """Keys that a token at `position` attends to, masked ones included: 2 * TILE, ..., 512, 1024, 1536, ..."""
    needed = position + 1
    if needed > _KEYS_STEP:
        return -(-needed // _KEYS_STEP) * _KEYS_STEP
    return max(2 * TILE, 1 << (needed - 1).bit_length())


@dataclass(frozen=True)
class _Part:
    """Tokens start .. end of a chunk, in rows row .. of a tile."""

    chunk: int
    start: int
    end: int
    row: int


class PagedReference:
    """PersimmonModel behind `infer.paged.PagedDecoder`; batch-invariant, see above."""

    name = "reference"
    shares_blocks = True

    def __init__(self, model: PersimmonModel, num_blocks: int, block_size: int) -> None:
        """Keys and values for num_blocks * block_size tokens; memory is taken as blocks are first used."""
        if block_size < 1 or 2 * TILE % block_size:
            raise InputError(f"block_size must divide {2 * TILE}, got {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._model = model.eval()
        weight, config = model.embed_tokens.weight, model.config
        self._device = weight.device
        # One more block than asked for: padding rows write there, and padded tables point to it.
        shape = (num_blocks + 1, block_size, config.num_heads, config.head_dim)
        self._keys = [torch.zeros(shape, dtype=weight.dtype, device=self._device) for _ in range(config.num_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._active = np.zeros((config.num_layers, 2))

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._model.config

    @property
    def active_fraction(self) -> list[float]:
        """Per layer, the share of MLP values that were not zero, over all tokens so far; empty before the first."""
        return [float(active / total) for active, total in self._active] if self._active[0, 1] else []

    @torch.inference_mode()
    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its blocks; float32 logits None, [V] or [T, V]. All of them are exact."""
        del exact_top
        for chunk in chunks:
            self._check(chunk)
        results = [self._room_for_logits(chunk) for chunk in chunks]
        for tile in _tiles([len(chunk.token_ids) for chunk in chunks]):
            self._run(chunks, tile, results)
        return [r[0] if r is not None and c.logits == "last" else r for c, r in zip(chunks, results, strict=True)]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in all layers, in order."""
        for source, target in pairs:
            for store in (*self._keys, *self._values):
                store[target] = store[source]

    def _check(self, chunk: PagedChunk) -> None:
        end, ids = chunk.start + len(chunk.token_ids), chunk.token_ids
        if not len(ids):
            raise InputError("a chunk holds no tokens")
        if end > min(self.config.max_positions, len(chunk.blocks) * self.block_size):
            raise InputError(f"{end} tokens do not fit into {len(chunk.blocks)} blocks of {self.block_size}")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise InputError(f"a token id is outside the vocabulary of {self.config.vocab_size}")

    def _room_for_logits(self, chunk: PagedChunk) -> Logits | None:
        """[1, V] for the last position, [T, V] for all."""
        if chunk.logits == "none":
            return None
        return np.empty((1 if chunk.logits == "last" else len(chunk.token_ids), self.config.vocab_size), np.float32)

    def _run(self, chunks: Sequence[PagedChunk], tile: Sequence[_Part], results: Sequence[Logits | None]) -> None:
        """One forward pass of TILE rows; fills in the logits that end in it."""
        ids = [i for part in tile for i in chunks[part.chunk].token_ids[part.start : part.end]]
        row = torch.tensor([ids + [0] * (TILE - len(ids))], device=self._device)
        cache = _TileCache(self._keys, self._values, [(chunks[part.chunk], part) for part in tile])

        def count(layer: int, active: Tensor) -> None:
            self._active[layer] += active[0, : len(ids)].count_nonzero().item(), len(ids) * active.shape[-1]

        hidden = self._model.features(row, cache=cache, observe=count)[0]
        wanted = [part for part in tile if self._wants_logits(chunks[part.chunk], part)]
        if not wanted:
            return
        logits = self._model.lm_head(hidden).float().cpu().numpy()
        for part in wanted:
            result, size = results[part.chunk], part.end - part.start
            assert result is not None, "wanted logits have their place"
            if chunks[part.chunk].logits == "last":
                result[0] = logits[part.row + size - 1]
            else:
                result[part.start : part.end] = logits[part.row : part.row + size]

    def _wants_logits(self, chunk: PagedChunk, part: _Part) -> bool:
        return chunk.logits == "all" or (chunk.logits == "last" and part.end == len(chunk.token_ids))


def _tiles(sizes: Sequence[int]) -> Iterator[list[_Part]]:
    """Cut chunks of these sizes, in order, into tiles of at most TILE tokens."""
    tile: list[_Part] = []
    row = 0
    for chunk, size in enumerate(sizes):
        start = 0
        while start < size:
            end = min(size, start + TILE - row)
            tile.append(_Part(chunk, start, end, row))
            row += end - start
            start = end
            if row == TILE:
                yield tile
                tile, row = [], 0
    if tile:
        yield tile


@dataclass(frozen=True)
class _Group:
    """Rows of a tile whose tokens attend to equally many keys, sequence by sequence: B of them."""

    rows: Tensor
    """Rows in the tile, [R]."""
    places: Tensor
    """Their places among the B * TILE padded queries, [R]."""
    tables: Tensor
    """Blocks, [B, S / block_size]."""
    mask: Tensor
    """0 or -inf, [B, 1, TILE, S]."""


class _TileCache:
    """`model.Cache` of one tile."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], parts: Sequence[tuple[PagedChunk, _Part]]) -> None:
        self._keys, self._values = keys, values
        self._block_size = keys[0].shape[1]
        self._scratch = keys[0].shape[0] - 1
        positions, slots = [0] * TILE, [self._scratch * self._block_size] * TILE
        spans: dict[int, list[tuple[PagedChunk, list[int], list[int]]]] = {}  # S -> (chunk, rows, positions)
        for chunk, part in parts:
            for row in range(part.row, part.row + part.end - part.start):
                position = chunk.start + part.start + row - part.row
                block, offset = divmod(position, self._block_size)
                positions[row], slots[row] = position, chunk.blocks[block] * self._block_size + offset
                group = spans.setdefault(padded_keys(position), [])
                if not group or group[-1][0] is not chunk:
                    group.append((chunk, [], []))
                group[-1][1].append(row)
                group[-1][2].append(position)
        self._positions, self._slots = self._tensor([positions]), self._tensor(slots)
        self._groups = [self._group(num_keys, span) for num_keys, span in spans.items()]

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Positions [1, TILE]; padding is at position 0."""
        assert (num_rows, num_tokens) == (1, TILE), "one row of TILE tokens"
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [1, N, TILE, D] in their slots; every query sees its own sequence up to itself."""
        keys, values = self._keys[layer], self._values[layer]
        keys.view(-1, *keys.shape[2:])[self._slots] = k[0].transpose(0, 1)
        values.view(-1, *values.shape[2:])[self._slots] = v[0].transpose(0, 1)
        out = torch.zeros_like(q)
        for group in self._groups:
            out[0, :, group.rows] = self._attend_group(group, q, keys, values)
        return out

    def advance(self, num_tokens: int) -> None:
        """Nothing to count: the caller keeps the lengths."""

    def _attend_group(self, group: _Group, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the group's queries, [N, R, D]."""
        batch, num_keys = group.mask.shape[0], group.mask.shape[-1]
        _, heads, _, dim = q.shape
        queries = q.new_zeros(batch * TILE, heads, dim)
        queries[group.places] = q[0, :, group.rows].transpose(0, 1)
        k, v = (x[group.tables].view(batch, num_keys, heads, dim).transpose(1, 2) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            queries.view(batch, TILE, heads, dim).transpose(1, 2), k, v, attn_mask=group.mask.to(q.dtype)
        )
        return out.transpose(1, 2).reshape(batch * TILE, heads, dim)[group.places].transpose(0, 1)

    def _group(self, num_keys: int, span: Sequence[tuple[PagedChunk, list[int], list[int]]]) -> _Group:
        """Tables and masks of the sequences in one group."""
        num_blocks = num_keys // self._block_size
        tables = [
            [*chunk.blocks[:num_blocks], *[self._scratch] * (num_blocks - len(chunk.blocks))] for chunk, _, _ in span
        ]
        last_key = torch.full((len(span), TILE), num_keys)  # padding queries see everything: never an empty row
        for index, (_, _, positions) in enumerate(span):
            last_key[index, : len(positions)] = torch.tensor(positions)
        hidden = torch.arange(num_keys) > last_key[..., None]  # [B, TILE, S]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None]
        places = [index * TILE + i for index, (_, rows, _) in enumerate(span) for i in range(len(rows))]
        rows = [row for _, rows, _ in span for row in rows]
        return _Group(self._tensor(rows), self._tensor(places), self._tensor(tables), mask.to(self._keys[0].device))

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, device=self._keys[0].device)
