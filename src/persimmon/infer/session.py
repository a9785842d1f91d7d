"""A sequence that stays between requests, so that a conversation prefills only what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from persimmon.infer import prompt_file
from persimmon.infer.decoder import Chunk, Decoder, Logits
from persimmon.infer.drawing import Draw, DrawingDecoder, GreedyDecoder, Picked

PREFILL_CHUNK = 512
"""Tokens between two reports of progress, and the longest wait of an interrupt, while a prompt is read."""

ReportProgress = Callable[[int, int], None]
"""Called with (tokens done, tokens in the prompt)."""


Drawing = tuple[Draw, NDArray[np.int64]]
"""What a DrawingDecoder (no other is asked) is to pick behind the newest token, and the ids it must not pick."""


class Greedy(NamedTuple):
    """Steps for a GreedyDecoder (no other is asked) to take by itself."""

    steps: int
    banned: NDArray[np.int64]
    stop_id: int


class Session:
    """One sequence of a decoder and the ids it holds."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """Raises ContextLengthError for a capacity that the model does not have."""
        self._decoder = decoder
        self._sequence = decoder.new_sequence(capacity)
        self._token_ids: list[int] = []
        self._guess: list[int] = []  # tokens stored behind them that may turn out to come next
        self._guess_picked: list[Picked] = []  # what the decoder gave behind each of those
        self.capacity = capacity
        self.reused = 0
        """Tokens that the last prefill found in place."""

    @property
    def token_ids(self) -> list[int]:
        """The ids whose keys and values are stored."""
        return self._token_ids[: self._sequence.length]

    @property
    def room(self) -> int:
        """Further tokens that can be stored."""
        return self.capacity - len(self._token_ids)

    def prefill(
        self, token_ids: Sequence[int], *, exact_top: int | None = None, progress: ReportProgress | None = None,
        draw: Drawing | None = None,
    ) -> Picked:  # fmt: skip
        """Make the sequence hold exactly `token_ids` and return the logits [V] behind them, or the token of `draw`.

        The longest common prefix stays, the rest of the old content is forgotten.
        """
        total = len(token_ids)
        self.reused = min(_common_prefix(self.token_ids, token_ids), total - 1)  # the last one gives the logits
        self._keep(self.reused)
        for start in range(self.reused, total, PREFILL_CHUNK):
            end = min(total, start + PREFILL_CHUNK)
            logits = self._append(token_ids[start:end], last=end == total, exact_top=exact_top, draw=draw)
            if progress is not None:
                progress(end, total)
        assert logits is not None, "a prompt has a last token"
        return logits

    def extend(
        self, token_id: int, *, exact_top: int | None = None, guess: Sequence[int] = (), draw: Drawing | None = None,
        greedy: Greedy | None = None,
    ) -> Picked:  # fmt: skip
        """Store one more token and return the logits [V] behind it, or the token of `draw` or `greedy`: at most one.

        guess: tokens that may come after it. They run in the same call, and where they are what the next calls bring,
        those have their logits already; what was wrong is forgotten. The tokens of `greedy` are such a guess, too:
        behind them come tokens, whatever is asked for, so a caller keeps to one kind.
        """
        if self.expects(token_id):
            self._token_ids.append(self._guess.pop(0))
            return self._guess_picked.pop(0)
        self._keep(len(self._token_ids))
        if greedy is not None:
            picked = cast(GreedyDecoder, self._decoder).greedy(self._sequence, token_id, *greedy)
            self._token_ids.append(token_id)
            self._guess, self._guess_picked = picked[:-1], list(picked[1:])
            return picked[0]
        if not guess:
            logits = self._append([token_id], last=True, exact_top=exact_top, draw=draw)
            assert logits is not None, "logits were asked for"
            return logits
        chunk = Chunk(self._sequence, [token_id, *guess], "all")
        (rows,) = self._decoder.forward([chunk], exact_top=exact_top)
        assert rows is not None, "logits were asked for"
        self._token_ids.append(token_id)
        self._guess, self._guess_picked = list(guess), list(rows[1:])
        first: Logits = rows[0]
        return first

    def expects(self, token_id: int) -> bool:
        """The token is the next of the guess: `extend` has what comes behind it."""
        return bool(self._guess) and self._guess[0] == token_id

    def restore(self, path: Path, token_ids: Sequence[int]) -> int:
        """Take over what a prompt file has of `token_ids`, where that is more than is here; returns how much it has.

        Raises NotFoundError without a file, PromptFileError for one that is not of this model, damaged or foreign,
        UnavailableError for an engine that has none.
        """
        decoder, sequence = prompt_file.storable(self._decoder, self._sequence)
        file = prompt_file.PromptFile(path, decoder)
        try:
            found = min(_common_prefix(file.token_ids, token_ids), self.capacity)
            if found > _common_prefix(self.token_ids, token_ids):
                self._keep(0)
                file.restore(sequence, found)
                self._token_ids = list(token_ids[:found])
        finally:
            file.close()
        return found

    def save(self, path: Path) -> None:
        """Write keys and values of `token_ids` to a prompt file; StorageError when it cannot be written."""
        prompt_file.write(path, *prompt_file.storable(self._decoder, self._sequence), self.token_ids)

    def close(self) -> None:
        """Give the memory back."""
        self._sequence.close()

    def _keep(self, length: int) -> None:
        """Forget the guess and everything behind the first `length` tokens."""
        self._guess, self._guess_picked = [], []
        self._token_ids = self._token_ids[:length]
        self._sequence.truncate(length)

    def _append(
        self, token_ids: Sequence[int], *, last: bool, exact_top: int | None, draw: Drawing | None
    ) -> Picked | None:
        chunk = Chunk(self._sequence, token_ids, "last" if last else "none")
        # An interrupt inside the call may leave tokens stored that are not noted here, never the other way round:
        # the next prefill cuts the sequence back to what is noted.
        logits: Picked | None
        if last and draw is not None:
            (logits,) = cast(DrawingDecoder, self._decoder).draw([chunk], [draw[0]], draw[1])
        else:
            (logits,) = self._decoder.forward([chunk], exact_top=exact_top)
        self._token_ids += token_ids
        return logits


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading ids."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
