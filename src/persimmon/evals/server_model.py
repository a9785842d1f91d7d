"""An OpenAI-compatible server as a LanguageModel.

Scores come from `POST /v1/completions` with `echo` and `logprobs`, which returns the log-probability of every token of
the prompt with its place in the text. A token that reaches over the end of the context counts for the continuation.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from persimmon.errors import InputError, UnavailableError
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Request, Response, Score, TokenLikelihoods

RETRIES = 4
_RETRIED = {408, 429, 500, 502, 503, 504}


class ServerLanguageModel:
    """Asks `url` (ending in /v1) for completions of text prompts, several at a time."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        context: int = 16_384,
        concurrency: int = 16,
        timeout_seconds: float = 600.0,
        seed: int = 0,
    ) -> None:
        """`model` None takes the server's first. Raises UnavailableError when it cannot be reached."""
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the URL must begin with http:// or https://, got {url!r}")
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._concurrency, self._seed = timeout_seconds, concurrency, seed
        self._model = model or self._first_model()
        self.context = context
        self.truncated = 0
        self.identity: Mapping[str, Any] = {"model": self._model, "url": self._url, "engine": "server", "seed": seed}

    def count_tokens(self, text: str) -> int:
        """As the server reports it for a prompt of one more completed token."""
        answer = self._post("/completions", {"prompt": text, "max_tokens": 1, "temperature": 0})
        return int(answer["usage"]["prompt_tokens"])

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request, in order."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self._respond, requests))

    def _respond(self, request: Request) -> Response:
        if isinstance(request, Generate):
            return self._generate(request)
        if isinstance(request, Measure):
            tokens = self._echo(request.text)
            return TokenLikelihoods([token.log_probability for token in tokens], len(request.text.encode()))
        return self._score(request)

    def _score(self, request: Score) -> Likelihood:
        tokens = self._echo(request.context + request.continuation)
        scored = [token for token in tokens if token.end > len(request.context)]
        if not scored:
            raise UnavailableError(f"{self._url} gave no token for the continuation {request.continuation!r}")
        return Likelihood(
            sum(token.log_probability for token in scored), all(token.greedy for token in scored), len(scored)
        )

    def _generate(self, request: Generate) -> list[str]:
        # Servers take at most four stop strings; the rest is cut here.
        body = {"prompt": request.context, "max_tokens": request.max_tokens, "temperature": request.temperature}
        body |= {"stop": list(request.stop[:4]) or None, "seed": self._seed, "n": request.count}
        answer = self._post("/completions", body)
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        return [_cut(str(choice["text"]), request.stop) for choice in choices]

    def _echo(self, text: str) -> list[_Token]:
        """The tokens of a prompt that have a log-probability, in order."""
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": self._seed}
        found = self._post("/completions", body)["choices"][0].get("logprobs")
        if not found or "text_offset" not in found:
            raise UnavailableError(f"{self._url} does not return log-probabilities of prompts (echo with logprobs)")
        offsets = [*found["text_offset"], len(text)]
        tokens = []
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        for index, (value, top) in enumerate(zip(found["token_logprobs"], tops, strict=True)):
            start, end = offsets[index], offsets[index + 1]
            if value is not None and start < len(text):
                greedy = top is not None and value >= max(top.values())
                tokens.append(_Token(min(end, len(text)), float(value), greedy))
        return tokens

    def _first_model(self) -> str:
        return str(self._send(urllib.request.Request(f"{self._url}/models", headers=self._headers))["data"][0]["id"])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps({"model": self._model, **body}).encode()
        return self._send(urllib.request.Request(f"{self._url}{path}", data, self._headers))

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        """Send, with patience for a server that is busy or starting."""
        problem = ""
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    content: dict[str, Any] = json.load(answer)
                    return content
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read(500).decode(errors='replace')}"
                if error.code not in _RETRIED:
                    raise InputError(f"{request.full_url} refused the request: {problem}") from None
            except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
                problem = str(error)
            time.sleep(0.2 * 4**attempt if attempt < RETRIES - 1 else 0)
        raise UnavailableError(f"{request.full_url} did not answer: {problem}")


class _Token:
    """A token of a prompt: where it ends in the text, and how likely it was."""

    def __init__(self, end: int, log_probability: float, greedy: bool) -> None:
        self.end, self.log_probability, self.greedy = end, log_probability, greedy


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(ends)] if ends else text
