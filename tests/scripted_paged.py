"""A paged decoder that says what is written down: the server and the page are tested, not the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from persimmon.infer.decoder import Logits
from persimmon.infer.engine import Engine
from persimmon.infer.paged import PagedChunk
from tiny_model import tiny_config
from tiny_tokenizer import tiny_tokenizer


class ScriptedPaged:
    """Answers a chat with the reply whose key its last question contains, one token per step."""

    name = "reference"
    shares_blocks = True
    active_fraction = (0.08, 0.1)

    def __init__(self, replies: Mapping[str, str], num_blocks: int, block_size: int, seconds: float) -> None:
        self.config = tiny_config(max_positions=16_384)
        self.num_blocks, self.block_size = num_blocks, block_size
        self._tokenizer = tiny_tokenizer()
        self._replies, self._seconds = replies, seconds
        self._marker = self._tokenizer.encode("\n\nadept:")
        self._tokens: dict[int, int] = {}  # by slot

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        time.sleep(self._seconds)
        return [self._run(chunk) for chunk in chunks]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            for offset in range(self.block_size):
                self._tokens[target * self.block_size + offset] = self._tokens.get(source * self.block_size + offset, 0)

    def _run(self, chunk: PagedChunk) -> Logits | None:
        end = chunk.start + len(chunk.token_ids)
        slots = [chunk.blocks[i // self.block_size] * self.block_size + i % self.block_size for i in range(end)]
        self._tokens.update(zip(slots[chunk.start :], chunk.token_ids, strict=True))
        if chunk.logits == "none":
            return None
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self._next([self._tokens[slot] for slot in slots])] = 50.0
        return logits

    def _next(self, ids: list[int]) -> int:
        size = len(self._marker)
        start = max(i for i in range(size, len(ids) + 1) if ids[i - size : i] == self._marker)
        question = self._tokenizer.decode(ids[: start - size]).rpartition("human:")[2]
        reply = next((text for key, text in self._replies.items() if key in question), "I have no words for that.")
        answer = [*self._tokenizer.encode(" " + reply), self._tokenizer.eos_id]
        return answer[min(len(ids) - start, len(answer) - 1)]


def build_scripted(replies: Mapping[str, str], seconds: float = 0.005) -> Engine:
    """Runs in the engine's process."""
    return Engine(ScriptedPaged(replies, 4096, 16, seconds), tiny_tokenizer(), max_running=8)
