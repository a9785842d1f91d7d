"""What the sequences of all engines keep count of, and what every engine refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from persimmon.errors import ContextLengthError, InputError
from persimmon.infer.decoder import Chunk, check_token_ids


class StoredSequence:
    """Lengths alone: where keys and values lie is the engine's to know."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._length = 0
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens whose keys and values are stored."""
        return self._length

    @property
    def capacity(self) -> int:
        """Most tokens it can hold."""
        return self._capacity

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        if not 0 <= length <= self._length:
            raise InputError(f"cannot truncate {self._length} stored tokens to {length}")
        self._length = length

    def close(self) -> None:
        """Nothing can be stored from now on."""
        self._closed, self._length = True, 0

    def check_room(self, num_tokens: int) -> None:
        """ContextLengthError unless that many more tokens fit; InputError when closed."""
        if self._closed:
            raise InputError("the sequence is closed")
        if self._length + num_tokens > self._capacity:
            raise ContextLengthError(
                f"{num_tokens} more tokens do not fit: {self._length} of {self._capacity} positions are taken"
            )

    def advance(self, num_tokens: int) -> None:
        """Count tokens as stored."""
        self._length += num_tokens


Own = TypeVar("Own", bound=StoredSequence)


def own_sequences(chunks: Sequence[Chunk], kind: type[Own], vocab_size: int) -> list[Own]:
    """The chunks' sequences; InputError for another decoder's, for one that appears twice, for ids that cannot be."""
    sequences: list[Own] = []
    for chunk in chunks:
        if not isinstance(chunk.sequence, kind):
            raise InputError(f"the sequence belongs to another decoder: {type(chunk.sequence).__name__}")
        sequences.append(chunk.sequence)
    if len({id(sequence) for sequence in sequences}) != len(sequences):
        raise InputError("a sequence appears twice in one call")
    for chunk in chunks:
        check_token_ids("a chunk", chunk.token_ids, vocab_size)
    return sequences
