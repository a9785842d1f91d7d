"""Tokens that a decoder picks where its logits are, so that numbers come to the host and not whole vocabularies.

A decoder that can do so has `draw` beside `forward`. It is asked for tokens of requests whose sampling it knows; what
moves single logits, or wants to see them, goes through `infer/sampling.py` on the host as everywhere. The draw of token
i of a request depends on its seed and i alone: not on what else runs, nor on pausing and resuming. It is another random
stream than the host's: the same distribution, other tokens for the same seed.

Greedy tokens need no randomness, and a decoder that has `greedy` picks several in one call: a small model takes a few
hundred microseconds for a token, and Python between two of them a tenth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from persimmon.infer.decoder import CachedSequence, Logits
from persimmon.infer.params import SamplingParams

Picked: TypeAlias = Logits | int
"""Logits [V] or [T, V] to pick from, or the token that was picked."""

_COOLEST = 1e-3
"""Least temperature, but for 0: below it a logit divided by it leaves what float32 tells apart."""


class Draw(NamedTuple):
    """A token to pick behind a chunk that asks for its last logits."""

    params: SamplingParams
    seed: int
    number: int
    """Tokens picked in the request before."""


@runtime_checkable
class DrawingDecoder(Protocol):
    """A Decoder or PagedDecoder that picks tokens itself."""

    def draw(
        self, chunks: Sequence[Any], draws: Sequence[Draw | None], banned: NDArray[np.int64]
    ) -> list[Picked | None]:
        """As `forward`, but the token where a chunk has a draw, or its logits where it could not be picked exactly.

        banned: ids that are never picked (sampling.banned_ids); pass the same array every time, for it is looked at
        when it is another one.
        """


@runtime_checkable
class GreedyDecoder(Protocol):
    """A Decoder that takes greedy steps by itself."""

    def greedy(
        self, sequence: CachedSequence, token_id: int, count: int, banned: NDArray[np.int64], stop_id: int
    ) -> list[int]:
        """Store a token, pick the likeliest behind it, store that one, and so on: the `count` tokens that were picked.

        Fewer where one is `stop_id` (-1: none is). The last one is not stored. Each is the first of the largest logits
        of `forward`, but never one of the `banned` ids.
        """


MOST_AHEAD = 64
"""Tokens of one call of `greedy`."""

_AHEAD_SECONDS = 0.02
"""A call's longest wait where tokens come faster, for whoever reads along or interrupts."""


def steps_ahead(seconds_per_token: float, most: int) -> int:
    """How many greedy tokens to ask for at once, 1 to `most`; one while their speed is not known (0)."""
    wished = _AHEAD_SECONDS / seconds_per_token if seconds_per_token > 0 else 1
    return int(max(1, min(wished, most, MOST_AHEAD)))


def can_draw(params: SamplingParams) -> bool:
    """Whether a device picks such tokens: nothing moves single logits, and nobody wants to see them."""
    warm = params.greedy or params.temperature >= _COOLEST
    return warm and params.logprobs is None and not params.penalized and not params.logit_bias
