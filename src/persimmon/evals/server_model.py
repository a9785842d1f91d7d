"""An OpenAI-compatible server as a LanguageModel.

Scores come from `POST /v1/completions` with `echo` and `logprobs`, which returns the log-probability of every token of
the prompt with its place in the text. A token that reaches over the end of the context counts for the continuation.
Servers that give no places (SGLang says -1 for each) are read by the texts of their tokens; where these do not add up
to the prompt, nothing is scored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

from persimmon.errors import ContextLengthError, UnavailableError
from persimmon.evals.server_client import FIRST_PATIENCE_SECONDS, ServerClient
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Request, Response, TokenLikelihoods

DEFAULT_CONTEXT = 16_384
"""Tokens, where a server does not say how many it takes."""

_KEPT = 0.9
"""Share of a text that is tried next when it does not fit; only the server knows how many tokens it has."""

T = TypeVar("T")


class ServerLanguageModel:
    """Asks `url` (ending in /v1) for completions of text prompts, several at a time."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        context: int | None = None,
        concurrency: int = 16,
        timeout_seconds: float = 600.0,
        seed: int = 0,
    ) -> None:
        """`model` None takes the server's first, `context` None what it says. UnavailableError without an answer."""
        self._client = ServerClient(url, api_key, timeout_seconds)
        self._concurrency, self._seed = concurrency, seed
        served = self._client.get("/models", FIRST_PATIENCE_SECONDS)["data"]
        self._model = model or str(served[0]["id"])
        about: Mapping[str, Any] = next((one for one in served if one["id"] == self._model), {})
        self.context: int = context or about.get("max_model_len") or DEFAULT_CONTEXT
        self.truncated = 0
        self._lock = threading.Lock()
        self.identity: Mapping[str, Any] = {
            "model": self._model, "url": self._client.url, "engine": "server", "context": self.context, "seed": seed
        }  # fmt: skip

    def count_tokens(self, text: str) -> int:
        """As the server reports it for a prompt of one more completed token."""
        answer = self._complete({"prompt": text, "max_tokens": 1, "temperature": 0})
        return int(answer["usage"]["prompt_tokens"])

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request, in order."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self._respond, requests))

    def _respond(self, request: Request) -> Response:
        if isinstance(request, Generate):
            return self._fitted(request.context, lambda context: self._generate(request, context), keep_end=True)
        if isinstance(request, Measure):
            return self._fitted(request.text, self._measure, keep_end=False)
        return self._fitted(request.context, lambda context: self._score(context, request.continuation), keep_end=True)

    def _fitted(self, text: str, ask: Callable[[str], T], *, keep_end: bool) -> T:
        """The answer for the text, or for as much of it as fits; counted when that is not all."""
        whole = text
        while True:
            try:
                answer = ask(text)
            except ContextLengthError:
                if not text:
                    raise
                size = int(len(text) * _KEPT)
                text = text[len(text) - size :] if keep_end else text[:size]
                continue
            if text != whole:
                with self._lock:
                    self.truncated += 1
            return answer

    def _measure(self, text: str) -> TokenLikelihoods:
        return TokenLikelihoods([token.log_probability for token in self._echo(text)], len(text.encode()))

    def _score(self, context: str, continuation: str) -> Likelihood:
        scored = [token for token in self._echo(context + continuation) if token.end > len(context)]
        if not scored:
            raise UnavailableError(f"{self._client.url} gave no token for the continuation {continuation!r}")
        return Likelihood(
            sum(token.log_probability for token in scored), all(token.greedy for token in scored), len(scored)
        )

    def _generate(self, request: Generate, context: str) -> list[str]:
        # Servers take at most four stop strings; the rest is cut here.
        body = {"prompt": context, "max_tokens": request.max_tokens, "temperature": request.temperature}
        body |= {"stop": list(request.stop[:4]) or None, "seed": self._seed, "n": request.count}
        choices = sorted(self._complete(body)["choices"], key=lambda choice: choice.get("index", 0))
        return [_cut(str(choice["text"]), request.stop) for choice in choices]

    def _echo(self, text: str) -> list[_Token]:
        """The tokens of a prompt that have a log-probability, in order."""
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": self._seed}
        found = self._complete(body)["choices"][0].get("logprobs")
        if not found or "token_logprobs" not in found:
            raise UnavailableError(f"{self._client.url} does not return log-probabilities of prompts")
        starts = found.get("text_offset") or []
        if not _are_places(starts, len(found["tokens"])):
            starts = rebuilt_offsets(text, found["tokens"])
        if starts is None:
            raise UnavailableError(
                f"{self._client.url} does not say where the tokens of a prompt are (text_offset), and their texts do "
                f"not add up to it: {text[:60]!r}"
            )
        tokens = []
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        for start, end, value, top in zip(starts, _ends(starts, len(text)), found["token_logprobs"], tops, strict=True):
            if value is not None and start < len(text):
                tokens.append(_Token(end, float(value), top is not None and value >= max(top.values())))
        return tokens

    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._client.post("/completions", {"model": self._model, **body})


class _Token:
    """A token of a prompt: where it ends in the text, and how likely it was."""

    def __init__(self, end: int, log_probability: float, greedy: bool) -> None:
        self.end, self.log_probability, self.greedy = end, log_probability, greedy


def _are_places(offsets: Sequence[int], count: int) -> bool:
    """Whether offsets can be those of tokens in a text: they rise from its beginning."""
    rising = all(before <= after for before, after in pairwise(offsets))
    return len(offsets) == count and count > 0 and offsets[0] == 0 and rising and offsets[-1] > 0


def rebuilt_offsets(text: str, tokens: Sequence[str]) -> list[int] | None:
    """Places of the tokens whose texts make up `text`; None when they do not.

    The first may be an opening token, which is no text, and a server that decodes tokens one by one may lose the
    space before a word.
    """
    places: list[int] = []
    end = 0
    for index, token in enumerate(tokens):
        places.append(end)
        if end >= len(text):
            continue
        spaced = not token.startswith(" ") and text.startswith(" " + token, end)
        if text.startswith(token, end) or spaced:
            end += len(token) + spaced
        elif index:
            return None
    return places if end == len(text) else None


def _ends(starts: Sequence[int], length: int) -> list[int]:
    """Where each token ends: where the next begins that does not share its place, as the bytes of a character do."""
    ends: list[int] = []
    end = length
    for index in range(len(starts) - 1, -1, -1):
        if index + 1 < len(starts) and starts[index + 1] > starts[index]:
            end = starts[index + 1]
        ends.append(min(end, length))
    return ends[::-1]


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(ends)] if ends else text
