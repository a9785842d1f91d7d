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
        self._marker = np.array(self._tokenizer.encode("\n\nadept:"), np.int32).tobytes()
        self._tokens = np.zeros((num_blocks, block_size), np.int32)
        self._answers: dict[bytes, list[int]] = {}  # by prompt

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        time.sleep(self._seconds)
        return [self._run(chunk) for chunk in chunks]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._tokens[target] = self._tokens[source]

    def _run(self, chunk: PagedChunk) -> Logits | None:
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            self._tokens[chunk.blocks[position // self.block_size], position % self.block_size] = token_id
        if chunk.logits == "none":
            return None
        stored = self._tokens[list(chunk.blocks)].ravel()[: chunk.start + len(chunk.token_ids)]
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self._next(stored.tobytes())] = 50.0
        return logits

    def _next(self, stored: bytes) -> int:
        """The reply's token behind the stored ids, each of four bytes."""
        start = stored.rfind(self._marker) + len(self._marker)
        prompt = stored[:start]
        if prompt not in self._answers:
            self._answers[prompt] = self._answer(np.frombuffer(prompt, np.int32).tolist())
        answer = self._answers[prompt]
        return answer[min((len(stored) - start) // 4, len(answer) - 1)]

    def _answer(self, prompt_ids: Sequence[int]) -> list[int]:
        question = self._tokenizer.decode(prompt_ids).rpartition("human:")[2]
        reply = next((text for key, text in self._replies.items() if key in question), "I have no words for that.")
        return [*self._tokenizer.encode(" " + reply), self._tokenizer.eos_id]


def build_scripted(replies: Mapping[str, str], seconds: float = 0.005, num_blocks: int = 4096) -> Engine:
    """Runs in the engine's process."""
    return Engine(ScriptedPaged(replies, num_blocks, 16, seconds), tiny_tokenizer(), max_running=8)
