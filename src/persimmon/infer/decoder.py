"""What every engine offers: sequences that keep their keys and values, and one call that runs several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.errors import InputError

Logits = NDArray[np.float32]


class CachedSequence(Protocol):
    """One token sequence inside a decoder; its keys and values belong to the decoder that made it."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are stored."""

    @property
    def capacity(self) -> int:
        """Most tokens it can hold."""

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""

    def close(self) -> None:
        """Give the memory back; the sequence cannot be used afterwards."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence, and the positions whose logits are wanted."""

    sequence: CachedSequence
    token_ids: Sequence[int]
    logits: Literal["none", "last", "all"] = "last"


class Decoder(Protocol):
    """A model that can run. Implementations: ReferenceDecoder here, faster ones in `persimmon.fast`."""

    @property
    def name(self) -> str:
        """Name of the engine: reference, cpu or cuda."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    def new_sequence(self, capacity: int) -> CachedSequence:
        """An empty sequence for up to `capacity` tokens (at most max_positions, else ContextLengthError)."""

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its sequence and return its float32 logits: None, [V] or [T, V].

        The result for one chunk does not depend on the others in the call, nor on how a prompt was cut into chunks,
        up to rounding stated by the engine. With `exact_top` = k only the k largest logits of each position need be
        exact and all others may be -inf, which lets an engine skip most of a large head.
        """


@dataclass(frozen=True)
class Scored:
    """What a model says about tokens of a text."""

    log_probabilities: NDArray[np.float64]
    """[T], of each token given all before it."""
    likeliest: NDArray[np.int32]
    """[T], the token with the largest logit in each place, the first of equals."""


@runtime_checkable
class ScoringDecoder(Protocol):
    """A decoder that gives log-probabilities without handing out logits."""

    def score(self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> list[Scored]:
        """Append each chunk to its sequence; what its last len(targets) positions say about the targets.

        The fields `logits` of the chunks are not looked at.
        """


def check_token_ids(what: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InputError, naming `what` holds them, for no ids at all or one outside the vocabulary."""
    if not len(token_ids):
        raise InputError(f"{what} holds no tokens")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{what} holds token id {low if low < 0 else high}, which is outside the vocabulary of {vocab_size}"
        )
