"""Tokens that a decoder picks where its logits are, so that one number comes to the host and not a whole vocabulary.

A decoder that can do so has `draw` beside `forward`. It is asked for tokens of requests whose sampling it knows; what
moves single logits, or wants to see them, goes through `infer/sampling.py` on the host as everywhere. The draw of token
i of a request depends on its seed and i alone: not on what else runs, nor on pausing and resuming. It is another random
stream than the host's: the same distribution, other tokens for the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from persimmon.infer.decoder import Logits
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


def can_draw(params: SamplingParams) -> bool:
    """Whether a device picks such tokens: nothing moves single logits, and nobody wants to see them."""
    warm = params.greedy or params.temperature >= _COOLEST
    return warm and params.logprobs is None and not params.penalized and not params.logit_bias
