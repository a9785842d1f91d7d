"""What continuous batching asks of a decoder: one cache of blocks for all sequences. No torch.

A paged decoder keeps no sequences. Every call says which blocks hold a sequence, how many tokens are stored in them
and what to append; blocks may appear in several tables, and calling again with the same `start` overwrites. So a call
that failed can simply be made again, and who owns what is decided in one place (`infer.blocks`).

An engine offers this by a method `paged(num_blocks, block_size) -> PagedDecoder`; for one that does not, `page`
gives every sequence a cache of its own and shares nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from persimmon.config import ModelConfig
from persimmon.infer.decoder import CachedSequence, Chunk, Decoder, Logits


class PagedChunk(NamedTuple):
    """New tokens behind the first `start` tokens of the sequence that is stored in `blocks`."""

    blocks: Sequence[int]
    """Token i is in block `blocks[i // block_size]`; the new tokens have room too."""
    start: int
    token_ids: Sequence[int]
    logits: Literal["none", "last", "all"] = "last"


class PagedDecoder(Protocol):
    """A model over one cache of `num_blocks` blocks of `block_size` tokens."""

    name: str
    num_blocks: int
    block_size: int
    shares_blocks: bool
    """A block may be part of several sequences."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """As `Decoder.forward`: float32 logits of each chunk, independent of the other chunks."""

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy the content of blocks (source, target), one pair after the other."""


@runtime_checkable
class Pageable(Protocol):
    """A decoder with a cache of blocks."""

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""

    def paged(self, num_blocks: int, block_size: int) -> PagedDecoder:
        """The same model over a block cache."""


def page(decoder: Decoder, num_blocks: int, block_size: int, *, max_sequences: int) -> PagedDecoder:
    """The decoder over a cache of blocks; at most `max_sequences` are in use at any time."""
    if isinstance(decoder, Pageable):
        return decoder.paged(num_blocks, block_size)
    return SeparateCaches(decoder, num_blocks, block_size, max_sequences)


class SeparateCaches:
    """Any decoder behind the paged interface: the first block of a sequence names a cache of its own.

    Only the caches of the `max_sequences` sequences used last are kept, which are all that can be running.
    """

    shares_blocks = False

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int, max_sequences: int) -> None:
        self.name = decoder.name
        self.num_blocks, self.block_size = num_blocks, block_size
        self._decoder, self._max_sequences = decoder, max_sequences
        self._capacity = min(decoder.config.max_positions, num_blocks * block_size)
        self._sequences: OrderedDict[int, CachedSequence] = OrderedDict()

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._decoder.config

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """See PagedDecoder."""
        plain = [Chunk(self._sequence(chunk), chunk.token_ids, chunk.logits) for chunk in chunks]
        return self._decoder.forward(plain, exact_top=exact_top)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Never called: nothing is shared."""
        assert not list(pairs), "a decoder with separate caches has no blocks to copy"

    def _sequence(self, chunk: PagedChunk) -> CachedSequence:
        key = chunk.blocks[0]
        if key not in self._sequences:
            self._sequences[key] = self._decoder.new_sequence(self._capacity)
            while len(self._sequences) > self._max_sequences:
                self._sequences.popitem(last=False)[1].close()
        self._sequences.move_to_end(key)
        sequence = self._sequences[key]
        sequence.truncate(chunk.start)
        return sequence
