"""Sequences that already hold tokens, for decoding at depth: read for real, or filled by copying blocks.

Reading 16,384 tokens takes as long as it takes, and to know the speed behind them only their number matters: attention
does the same work whatever the keys and values are. So a block of tokens is read for real and copied into every
other block of the cache, through the block interface that continuous batching uses. Each copy is memory of its own
and is read like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from persimmon.bench.subject import Subject, random_ids
from persimmon.errors import UnavailableError
from persimmon.fast.cpu.decoder import SEQUENCE_BLOCK
from persimmon.infer.decoder import Chunk, Logits
from persimmon.infer.drawing import MOST_AHEAD, GreedyDecoder
from persimmon.infer.paged import PagedChunk, page

FILLS = ("read", "copy")

_BLOCK = 32  # tokens
_BLOCK_BY_ENGINE = {"cpu": SEQUENCE_BLOCK}  # as in a sequence's own cache


class FilledCache(ABC):
    """Several sequences of equal depth."""

    @abstractmethod
    def step(self, ids: Sequence[int]) -> list[Logits]:
        """Append one token to each; logits of which the largest is exact."""

    @abstractmethod
    def rewind(self) -> None:
        """Forget the tokens of all steps."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""

    def decode(self, ids: Sequence[int], steps: int) -> list[Logits]:
        """Append a token to each, then the likeliest behind it, `steps` in all; the logits behind the last."""
        for _ in range(steps - 1):
            ids = [int(np.argmax(row)) for row in self.step(ids)]
        return self.step(ids)


def fill(subject: Subject, how: str, depth: int, room: int, batch: int) -> FilledCache:
    """`batch` sequences of `depth` tokens with room for `room` more.

    how: `read` or `copy`. Raises UnavailableError for `copy` where the engine has no cache of blocks.
    """
    return (ReadCache if how == "read" else CopiedCache)(subject, depth, room, batch)


class ReadCache(FilledCache):
    """Every token was read."""

    def __init__(self, subject: Subject, depth: int, room: int, batch: int) -> None:
        self._decoder, self._depth = subject.decoder, depth
        self._sequences = [subject.decoder.new_sequence(depth + room) for _ in range(batch)]
        ids = [random_ids(subject.config, depth, seed) for seed in range(batch)]
        self._decoder.forward([Chunk(s, prompt, "none") for s, prompt in zip(self._sequences, ids, strict=True)])

    def step(self, ids: Sequence[int]) -> list[Logits]:
        """See FilledCache."""
        chunks = [Chunk(sequence, [token]) for sequence, token in zip(self._sequences, ids, strict=True)]
        return [row for row in self._decoder.forward(chunks, exact_top=1) if row is not None]

    def decode(self, ids: Sequence[int], steps: int) -> list[Logits]:
        """See FilledCache; one sequence as `generate` does, by a decoder that takes greedy steps itself."""
        if len(ids) > 1 or not isinstance(self._decoder, GreedyDecoder):
            return super().decode(ids, steps)
        (sequence,), (token,) = self._sequences, ids
        for first in range(0, steps - 1, MOST_AHEAD):
            count = min(steps - 1 - first, MOST_AHEAD)
            token = self._decoder.greedy(sequence, token, count, np.empty(0, np.int64), stop_id=-1)[-1]
        return self.step([token])

    def rewind(self) -> None:
        """See FilledCache."""
        for sequence in self._sequences:
            sequence.truncate(self._depth)

    def close(self) -> None:
        """See FilledCache."""
        for sequence in self._sequences:
            sequence.close()


class CopiedCache(FilledCache):
    """One block of each sequence was read; the others are copies of it."""

    def __init__(self, subject: Subject, depth: int, room: int, batch: int) -> None:
        size = _BLOCK_BY_ENGINE.get(subject.decoder.name, _BLOCK)
        blocks = -(-(depth + room) // size)
        self._decoder = page(subject.decoder, blocks * batch, size, max_sequences=batch)
        if not self._decoder.shares_blocks:
            raise UnavailableError(f"--fill copy: the {subject.decoder.name} engine keeps no cache of blocks; use read")
        self._tables = [range(first, first + blocks) for first in range(0, blocks * batch, blocks)]
        self._depth = self._length = depth
        for seed, table in enumerate(self._tables):
            ids = random_ids(subject.config, min(depth, size), seed)
            self._decoder.forward([PagedChunk(table, 0, ids, "none")])
            self._decoder.copy_blocks((table[0], block) for block in table[1:])

    def step(self, ids: Sequence[int]) -> list[Logits]:
        """See FilledCache."""
        chunks = [PagedChunk(table, self._length, [token]) for table, token in zip(self._tables, ids, strict=True)]
        self._length += 1
        return [row for row in self._decoder.forward(chunks, exact_top=1) if row is not None]

    def rewind(self) -> None:
        """See FilledCache."""
        self._length = self._depth

    def close(self) -> None:
        """See FilledCache: the cache goes with the decoder over it."""
        del self._decoder
