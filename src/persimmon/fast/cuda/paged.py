"""The CUDA engine under continuous batching: the `PagedDecoder` of infer/paged.py over a pool of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError
from persimmon.fast.cuda.runner import Piece, Runner
from persimmon.infer.decoder import Logits, check_token_ids
from persimmon.infer.drawing import Draw, Picked
from persimmon.infer.paged import PagedChunk


class PagedCuda:
    """One cache of blocks for all sequences; who owns which block is the caller's to know."""

    name = "cuda"
    shares_blocks = True

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_blocks, self.block_size = runner.pool.num_blocks, runner.pool.block_size

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._runner.network.weights.config

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its blocks; float32 logits None, [V] or [T, V]. All of them are exact."""
        del exact_top
        return cast(list[Logits | None], self.draw(chunks, [None] * len(chunks), np.array([], np.int64)))

    def draw(
        self, chunks: Sequence[PagedChunk], draws: Sequence[Draw | None], banned: NDArray[np.int64]
    ) -> list[Picked | None]:
        """The same, but the token where a chunk has a draw: see infer/drawing.py."""
        for chunk in chunks:
            self._check(chunk)
        return self._runner.draw([Piece(c.blocks, c.start, c.token_ids, c.logits) for c in chunks], draws, banned)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in all layers, in order."""
        self._runner.pool.copy_blocks(pairs)

    def _check(self, chunk: PagedChunk) -> None:
        check_token_ids("a chunk", chunk.token_ids, self.config.vocab_size)
        end = chunk.start + len(chunk.token_ids)
        if end > min(self.config.max_positions, len(chunk.blocks) * self.block_size):
            raise ContextLengthError(f"{end} tokens do not fit into {len(chunk.blocks)} blocks of {self.block_size}")
