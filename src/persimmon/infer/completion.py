"""One request from its first token to its last: sampling, text, stop strings, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from persimmon.infer.decoder import Logits
from persimmon.infer.params import SamplingParams
from persimmon.infer.sampling import Mask, Sampler, TokenLogprob
from persimmon.infer.stops import StopMatcher
from persimmon.tokenizer import IncrementalDecoder, Tokenizer


class Piece(NamedTuple):
    """New text of a stream, and the tokens that were picked since the piece before.

    The pieces of a stream together give exactly the text and the token ids of its Generation. Text may lag behind
    the tokens, while a character or a possible stop string is incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, when asked for."""

    @property
    def logprob(self) -> float | None:
        """Log-probability of the tokens together."""
        return sum(entry.logprob for entry in self.logprobs) if self.logprobs else None


class Usage(NamedTuple):
    """Tokens of a request."""

    prompt_tokens: int
    """Tokens of the prompt as it was run: after `truncate-left` or `shift`."""
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that a session or a prompt file already held."""
    guessed_tokens: int = 0
    """Tokens that were run on a guess (`lookup`)."""
    accepted_tokens: int = 0
    """Of these, the ones that the answer turned out to have."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds inside the engine and the sampler; what the reader of a stream does in between is not counted."""

    prefill_seconds: float
    """Until the first token."""
    decode_seconds: float
    """For all tokens after the first."""
    tokens_per_second: float
    """Tokens after the first by `decode_seconds`; 0 when there are none."""


@dataclass(frozen=True)
class Generation:
    """What a request gave."""

    text: str
    """Without the stop string and without end-of-text."""
    token_ids: list[int]
    """Every id that was picked, those of end-of-text and of the stop string included."""
    finish_reason: str | None
    """`stop`: end-of-text or a stop string; `length`: max_tokens or the context is full; None: interrupted."""
    stop: str | None
    """The stop string that was met."""
    usage: Usage
    timings: Timings
    seed: int
    """Gives the same text again."""
    logprobs: list[TokenLogprob] | None = None
    """One per token, when asked for."""


class Completion:
    """Turns one request's logits into tokens, text and an end. Knows no decoder, so any loop can drive it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        banned: NDArray[np.int64],
        num_rows: int,
        prompt_ids: Sequence[int],
        *,
        skip_space: bool = False,
    ) -> None:
        """`banned` from `sampling.banned_ids`; `skip_space` drops one space at the head of the text."""
        self.sampler = Sampler(params, banned, num_rows, prompt_ids=prompt_ids)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self._eos_id, self._max_tokens = tokenizer.eos_id, params.max_tokens
        after_text = any(token_id not in tokenizer.special_ids for token_id in prompt_ids)
        self._decoder = IncrementalDecoder(tokenizer, continuation=after_text)
        self._stops = StopMatcher(params.stop)
        self._skip_space = skip_space
        self._texts: list[str] = []
        self._emitted = 0  # tokens that pieces have carried

    @property
    def text(self) -> str:
        """The text of all pieces so far."""
        return "".join(self._texts)

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        return self._stops.matched

    def accept(self, logits: Logits | int, allowed: Mask | None = None) -> Piece | None:
        """Pick the next token; returns the piece that it completes, and always one with the last token.

        Where `allowed` [V] is given, only those tokens can be picked. A token that the decoder picked comes as it is.
        """
        if isinstance(logits, int):
            self.sampler.note(logits)
            return self._take(logits)
        token_id, report = self.sampler.sample(logits, allowed)
        if report is not None:
            self.logprobs.append(report)
        return self._take(token_id)

    def replay(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Go to where pieces had carried these tokens: what follows is what would have followed then."""
        self.logprobs.extend(logprobs)
        for token_id in token_ids:
            self.sampler.note(token_id)
            self._take(token_id)
        self._emitted = len(self.token_ids)

    def _take(self, token_id: int) -> Piece | None:
        self.token_ids.append(token_id)
        if token_id == self._eos_id:
            self.finish_reason = "stop"
            return self._piece(self._flush())
        text = self._stops.add(self._decoder.add(token_id))
        if self.stop is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_tokens:
            return self.end(text)
        return self._piece(text) if text or self.finish_reason else None

    def end(self, text: str = "") -> Piece:
        """Stop for lack of room; the last piece carries `text` and whatever was held back."""
        text += self._flush()
        # The replacement for half a character may have completed a stop string.
        self.finish_reason = "length" if self.stop is None else "stop"
        return self._piece(text)

    def _flush(self) -> str:
        return self._stops.add(self._decoder.finish()) + self._stops.finish()

    def _piece(self, text: str) -> Piece:
        """The text with the tokens since the last piece."""
        if self._skip_space and text:
            text, self._skip_space = text.removeprefix(" "), False
        start, self._emitted = self._emitted, len(self.token_ids)
        self._texts.append(text)
        return Piece(text, tuple(self.token_ids[start:]), tuple(self.logprobs[start:]))
