"""A model whose answers are written down, and a tokenizer of single bytes: a chat without weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

Piece = str | Callable[[], str]
"""Text, or what happens before the text comes."""
Script = Callable[[list[dict[str, str]]], Sequence[Piece]]
"""Messages -> the pieces of the answer."""


class ByteTokenizer:
    """One token per byte of UTF-8."""

    bos_id = eos_id = 256

    def encode(self, text: str, *, bos: bool = False, continuation: bool = False) -> list[int]:
        return [self.bos_id] * bos + list(text.encode())


class ScriptedStream:
    """What `Persimmon.stream_chat` returns, for pieces that are known beforehand; each counts as one token."""

    def __init__(self, pieces: Sequence[Piece], max_tokens: int, delay: float) -> None:
        self._pieces = list(pieces[:max_tokens])
        self._all = len(pieces)
        self._delay = delay
        self._given = 0
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        while self._given < len(self._pieces) and not self._closed:
            time.sleep(self._delay)
            piece = self._pieces[self._given]
            text = piece if isinstance(piece, str) else piece()
            self._given += 1
            yield SimpleNamespace(text=text)

    def close(self) -> None:
        self._closed = True

    def result(self) -> Any:
        ended = self._given == len(self._pieces)
        reason = ("stop" if self._given == self._all else "length") if ended else None
        return SimpleNamespace(
            usage=SimpleNamespace(completion_tokens=self._given),
            timings=SimpleNamespace(tokens_per_second=50.0),
            finish_reason=reason,
        )


class ScriptedModel:
    """Answers by a script and remembers what it was asked."""

    def __init__(self, script: Script, *, context: int = 16_384, delay: float = 0.0) -> None:
        self.tokenizer = ByteTokenizer()
        self.context = context
        self.requests: list[tuple[list[dict[str, str]], dict[str, Any]]] = []
        self._script = script
        self._delay = delay

    def stream_chat(self, messages: Sequence[dict[str, str]], *, progress: Any, **sampling: Any) -> ScriptedStream:
        self.requests.append((list(messages), sampling))
        return ScriptedStream(self._script(list(messages)), sampling["max_tokens"], self._delay)


def echo(messages: list[dict[str, str]]) -> list[str]:
    """Says the last message back, word by word."""
    return [f" {word}" for word in ["You", "said:", *messages[-1]["content"].split()]]
