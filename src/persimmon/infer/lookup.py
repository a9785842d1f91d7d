"""Guessing the next tokens from the text itself: no second model, and no change to what is generated.

Answers about a document, edits of code and chats repeat what stands before them. When the last few tokens occurred
earlier, what followed them there is taken for a guess, and the model runs over the guess in one call, which on a CPU
costs little more than one token: the weights are read once (prompt lookup: Saxena 2023, transformers; speculative
decoding: Leviathan et al. 2023, arXiv:2211.17192).

The rule of speculative sampling is to accept a guessed token x with its probability p(x) under the model, and otherwise
to draw from p without x. For a guess that is certain this is the same as drawing from p and comparing with x, so the
sampler does what it always does, with its penalties, seed and log-probabilities, and the guess only decides whether
the logits of the following position are there already. With logits that do not depend on the size of a call (the cpu
engine) every answer is the same, token by token, as without guessing.
"""

from __future__ import annotations

from collections.abc import Sequence

from persimmon.errors import InputError

LONGEST, SHORTEST = 3, 1
"""Tokens that must agree: three are tried first; a single one is right often enough to pay for a few rows of a call."""

MAX_LOOKUP = 64
"""Tokens of a guess: beyond that a call is bound by arithmetic, not by reading the weights."""


def check_lookup(count: int) -> None:
    """Raise InputError unless so many tokens can be guessed at a time."""
    if not 0 <= count <= MAX_LOOKUP:
        raise InputError(f"lookup must be from 0 to {MAX_LOOKUP} tokens, got {count}")


class Lookup:
    """A text that grows, and where its short runs of tokens ended last."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # run -> where it ended, not counting one at the very end
        self._newest: list[tuple[int, ...]] = []  # the runs at the very end
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """The text goes on."""
        end = len(self._token_ids)
        for run in self._newest:
            self._ends[run] = end
        self._token_ids.append(token_id)
        self._newest = [
            tuple(self._token_ids[-length:]) for length in range(LONGEST, SHORTEST - 1, -1) if length <= end + 1
        ]

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the last occurrence of the longest run that the text ends with."""
        for run in self._newest:
            if (end := self._ends.get(run)) is not None:
                return self._token_ids[end : end + count]
        return []
