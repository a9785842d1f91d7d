"""The CPU engine over one cache of blocks for all sequences, for continuous batching.

The kernels read keys and values through a table of blocks in any case (native/kv_cache.h), so logits are the same bits
as those of a sequence by itself: alone or in a crowd, from blocks of its own or shared ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.infer.decoder import Logits, check_token_ids
from persimmon.infer.paged import PagedChunk

if TYPE_CHECKING:
    from persimmon.fast.cpu.decoder import CpuDecoder


class PagedCpu:
    """CpuDecoder behind `infer.paged.PagedDecoder`."""

    name = "cpu"
    shares_blocks = True

    def __init__(self, decoder: CpuDecoder, cache: Any, num_blocks: int, block_size: int) -> None:
        """Keys and values for num_blocks * block_size tokens in a native cache; memory is taken as blocks are used."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self._decoder, self._cache = decoder, cache

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._decoder.config

    @property
    def active_fraction(self) -> list[float]:
        """Per layer, the share of MLP values that were not zero, over all tokens so far; empty before the first."""
        counts, neurons = self._decoder.layer_counts(), self.config.intermediate_size
        if not counts[0]["tokens"]:
            return []
        return [layer["active"] / (layer["tokens"] * neurons) for layer in counts]

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Store each chunk in its blocks; float32 logits None, [V] or [T, V]."""
        for chunk in chunks:
            self._check(chunk)
        if not chunks:
            return []
        places = [(self._cache, np.asarray(chunk.blocks, np.int32), chunk.start) for chunk in chunks]
        return self._decoder.run(places, [(chunk.token_ids, chunk.logits) for chunk in chunks], exact_top)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in all layers, in order."""
        for source, target in pairs:
            self._cache.copy_block(source, target)

    def _check(self, chunk: PagedChunk) -> None:
        """Refuse a call before it changes anything."""
        check_token_ids("a chunk", chunk.token_ids, self.config.vocab_size)
        end = chunk.start + len(chunk.token_ids)
        if end > min(self.config.max_positions, len(chunk.blocks) * self.block_size):
            raise InputError(f"{end} tokens do not fit into {len(chunk.blocks)} blocks of {self.block_size}")
