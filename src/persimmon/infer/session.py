"""A sequence that stays between requests, so that a conversation prefills only what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from persimmon.infer.decoder import Chunk, Decoder, Logits

PREFILL_CHUNK = 512
"""Tokens between two reports of progress, and the longest wait of an interrupt, while a prompt is read."""

ReportProgress = Callable[[int, int], None]
"""Called with (tokens done, tokens in the prompt)."""


class Session:
    """One sequence of a decoder and the ids it holds."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """Raises ContextLengthError for a capacity that the model does not have."""
        self._decoder = decoder
        self._sequence = decoder.new_sequence(capacity)
        self._token_ids: list[int] = []
        self.capacity = capacity
        self.reused = 0
        """Tokens that the last prefill found in place."""

    @property
    def token_ids(self) -> list[int]:
        """The ids whose keys and values are stored."""
        return self._token_ids[: self._sequence.length]

    @property
    def full(self) -> bool:
        """No further token can be stored."""
        return self._sequence.length >= self.capacity

    def prefill(
        self, token_ids: Sequence[int], *, exact_top: int | None = None, progress: ReportProgress | None = None
    ) -> Logits:
        """Make the sequence hold exactly `token_ids` and return the logits [V] behind them.

        The longest common prefix stays, the rest of the old content is forgotten.
        """
        total = len(token_ids)
        self.reused = min(_common_prefix(self.token_ids, token_ids), total - 1)  # the last one gives the logits
        self._sequence.truncate(self.reused)
        self._token_ids = list(token_ids[: self.reused])
        for start in range(self.reused, total, PREFILL_CHUNK):
            end = min(total, start + PREFILL_CHUNK)
            logits = self._append(token_ids[start:end], last=end == total, exact_top=exact_top)
            if progress is not None:
                progress(end, total)
        assert logits is not None, "a prompt has a last token"
        return logits

    def extend(self, token_id: int, *, exact_top: int | None = None) -> Logits:
        """Store one more token and return the logits [V] behind it."""
        logits = self._append([token_id], last=True, exact_top=exact_top)
        assert logits is not None, "logits were asked for"
        return logits

    def close(self) -> None:
        """Give the memory back."""
        self._sequence.close()

    def _append(self, token_ids: Sequence[int], *, last: bool, exact_top: int | None) -> Logits | None:
        chunk = Chunk(self._sequence, token_ids, "last" if last else "none")
        # An interrupt inside the call may leave tokens stored that are not noted here, never the other way round:
        # the next prefill cuts the sequence back to what is noted.
        (logits,) = self._decoder.forward([chunk], exact_top=exact_top)
        self._token_ids += token_ids
        return logits


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading ids."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
