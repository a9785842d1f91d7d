"""A decoder whose next tokens are written down: what is tested is everything around the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from persimmon.infer.decoder import CachedSequence, Chunk, Logits
from tiny_model import tiny_config


class ScriptedSequence:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[int] = []
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]

    def close(self) -> None:
        self.closed = True


class ScriptedDecoder:
    """`script` maps the ids of a sequence to the next one, which gets a logit of 50 above all others."""

    name = "reference"

    def __init__(self, script: Callable[[list[int]], int]) -> None:
        self.config = tiny_config()
        self.sequences: list[ScriptedSequence] = []
        self.calls: list[int] = []  # tokens per call
        self._script = script

    def new_sequence(self, capacity: int) -> ScriptedSequence:
        self.sequences.append(ScriptedSequence(capacity))
        return self.sequences[-1]

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        results: list[Logits | None] = []
        for chunk in chunks:
            assert isinstance(chunk.sequence, ScriptedSequence)
            chunk.sequence.ids += chunk.token_ids
            assert chunk.sequence.length <= chunk.sequence.capacity
            self.calls.append(len(chunk.token_ids))
            logits = np.zeros(self.config.vocab_size, np.float32)
            if chunk.logits == "last":
                logits[self._script(chunk.sequence.ids)] = 50.0
            results.append(None if chunk.logits == "none" else logits)
        return results


def says(prompt_length: int, answer: Sequence[int]) -> ScriptedDecoder:
    """Gives the ids of `answer`, one after the other, behind a prompt of that length."""
    return ScriptedDecoder(lambda ids: answer[len(ids) - prompt_length])


class ScriptedGreedyDecoder(ScriptedDecoder):
    """The same, taking greedy steps by itself (infer.drawing.GreedyDecoder)."""

    def __init__(self, script: Callable[[list[int]], int]) -> None:
        super().__init__(script)
        self.bursts: list[int] = []  # tokens picked per call of `greedy`

    def greedy(
        self, sequence: CachedSequence, token_id: int, count: int, banned: NDArray[np.int64], stop_id: int
    ) -> list[int]:
        assert isinstance(sequence, ScriptedSequence) and count >= 1
        picked: list[int] = []
        while len(picked) < count and stop_id not in picked:
            sequence.ids.append(picked[-1] if picked else token_id)
            assert sequence.length <= sequence.capacity
            picked.append(self._script(sequence.ids))
        self.bursts.append(len(picked))
        return picked
