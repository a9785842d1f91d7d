"""From a checked body to requests for the engine, and the rules about when they are taken."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from persimmon import chat
from persimmon.infer.engine import Request
from persimmon.serve.metrics import Metrics
from persimmon.serve.protocol import ChatMessage, ChatRequest, CompletionRequest, Sampling
from persimmon.serve.settings import ServerSettings
from persimmon.serve.submission import Submission, Worker
from persimmon.tokenizer import Tokenizer

_SHORT_TEXT = 4_096
"""Characters that are encoded at once, which takes about a millisecond: a thread would wait longer for its turn."""


class ApiError(Exception):
    """An error answer."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong."""
    return ApiError(400, message, "invalid_request_error", param=param, code=code)


def unavailable(message: str) -> ApiError:
    """503: not now."""
    return ApiError(503, message, "server_error", code="unavailable", retry_after=5)


@dataclass
class Service:
    """The model behind the routes."""

    worker: Worker
    tokenizer: Tokenizer
    model: str
    """Its name in answers."""
    context: int
    settings: ServerSettings
    metrics: Metrics
    aliases: frozenset[str] = frozenset()
    """Other names that requests may give."""
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name != self.model and name not in self.aliases:
            message = f"the model {name!r} is not served here; {self.model!r} is"
            raise ApiError(404, message, "invalid_request_error", param="model", code="model_not_found")

    def check_ready(self) -> None:
        """503 while nothing can be answered."""
        if self.draining:
            raise unavailable("the server is shutting down")
        if self.worker.failed is not None:
            raise unavailable(f"the model could not be loaded: {self.worker.failed}")
        if not self.worker.ready.is_set() and not self.worker.restarts:
            raise unavailable("the model is loading")

    def submit(self, requests: Sequence[Request], conversation: str | None = None) -> Submission:
        """Hand requests to the engine; 429 when the queue is full. `conversation`: see `Ticket`."""
        self.check_ready()
        limit = self.settings.max_concurrency + self.settings.max_queue
        if self.worker.in_flight + len(requests) > limit:
            message = f"too many requests: {self.worker.in_flight} are running or waiting and the limit is {limit}"
            raise ApiError(
                429, message, "rate_limit_exceeded", code="rate_limit_exceeded", retry_after=self._retry_after()
            )
        return Submission(self.worker, requests, conversation)

    async def chat_requests(self, body: ChatRequest) -> list[Request]:
        """One request per choice of a chat."""
        length = sum(len(message.text) for message in body.messages)
        prompt = tuple(await _aside(length, self.encode_messages, body.messages))
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling_params(self._room(prompt, wanted), logprobs, body.seed)
        params = params.replace(stop=(*params.stop, *chat.STOP_STRINGS))
        return _choices(Request("", prompt, params, skip_space=True, grammar=body.grammar()), body)

    async def completion_requests(self, body: CompletionRequest) -> list[Request]:
        """One request per prompt and choice, choices of a prompt together."""
        requests: list[Request] = []
        for prompt in body.prompts():
            ids = tuple(prompt if isinstance(prompt, list) else await self._encode(prompt, body.add_special_tokens))
            if not ids:
                raise invalid("the prompt holds no tokens", "prompt")
            wanted = max(body.max_tokens, 1) if body.max_tokens is not None else None
            params = body.sampling_params(self._room(ids, wanted), body.logprobs, body.seed)
            scored = body.logprobs if body.echo and body.logprobs is not None else None
            requests += _choices(Request("", ids, params, prompt_logprobs=scored, grammar=body.grammar()), body)
        if len(requests) > self.settings.max_concurrency + self.settings.max_queue:
            raise invalid(f"{len(requests)} prompts and choices in one request are more than the queue holds", "prompt")
        return requests

    def encode_messages(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt of a conversation."""
        return chat.encode(self.tokenizer, [{"role": m.speaker, "content": m.text} for m in messages])

    async def _encode(self, prompt: str, bos: bool) -> list[int]:
        return await _aside(len(prompt), functools.partial(self.tokenizer.encode, prompt, bos=bos))

    def _room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """Tokens of the answer; 400 when prompt and answer do not fit into the context."""
        room = self.context - len(prompt) + 1  # the last token is never stored
        if room < 1 or (wanted is not None and wanted > room):
            asked = f" and {wanted} tokens are asked for" if wanted is not None else ""
            message = f"the prompt has {len(prompt)} tokens{asked}; the context is {self.context}"
            raise invalid(message, code="context_length_exceeded")
        if wanted is not None:
            return wanted
        held = (self.worker.capacity or self.context) - len(prompt) + 1  # an open end never asks for more than there is
        return max(1, min(room, held))

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free: a guess from the length of the queue."""
        return 1 + self.worker.in_flight // self.settings.max_concurrency


async def _aside(length: int, encode: Callable[..., list[int]], *args: Any) -> list[int]:
    """Encode a text of `length` characters: a long one in a thread, so that nobody waits for it."""
    return encode(*args) if length <= _SHORT_TEXT else await asyncio.to_thread(encode, *args)


def _choices(request: Request, body: Sampling) -> list[Request]:
    """The n choices of one prompt, each with its own seed; the first has the seed that was asked for."""
    seed = body.seed if body.seed is not None else secrets.randbits(62)
    count = body.n or 1
    return [
        replace(request, id=uuid.uuid4().hex, params=request.params.replace(seed=_wrapped(seed + index)))
        for index in range(count)
    ]


def _wrapped(seed: int) -> int:
    """Within 64 bits."""
    return seed if seed < 2**63 else seed - 2**64
