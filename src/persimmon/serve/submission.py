"""Requests in flight: what an HTTP call waits for, and what it waits on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from persimmon.infer.completion import Piece
from persimmon.infer.engine import EngineState, Failure, Request, Update

_KEY_TOKENS = 64
"""Tokens at the head of a prompt that say which other prompts it is likely to share a cache with."""


@dataclass(eq=False)
class Ticket:
    """A request in flight: its updates as they come."""

    request: Request
    updates: asyncio.Queue[tuple[int, Update]]
    index: int
    """Its place among the requests that share the queue."""
    sent: bool = False
    """The present process has it."""
    deaths: int = 0
    """Processes that died under it since its last token."""
    submitted_at: float = field(default_factory=time.monotonic)
    conversation: str = ""
    """Requests with the same one gain from running on the same engine, where there are several."""
    answered: list[Piece] = field(default_factory=list)
    """What has come of the answer."""

    def rest(self) -> Request:
        """The request, to be taken up where the answer stands."""
        return replace(
            self.request,
            replayed=tuple(token_id for piece in self.answered for token_id in piece.token_ids),
            replayed_logprobs=tuple(entry for piece in self.answered for entry in piece.logprobs),
        )


class Worker(Protocol):
    """Whatever runs requests: an engine of this server's, or several elsewhere. Belongs to one event loop."""

    ready: asyncio.Event
    """Requests can be run."""
    failed: str | None
    """Why the model could not be loaded."""
    restarts: int
    engine_name: str
    capacity: int | None
    """Tokens that the cache of an engine holds, once known."""
    on_update: Callable[[Ticket, Update], None]
    """Called for every update: metrics."""
    on_cancel: Callable[[Ticket], None]

    @property
    def state(self) -> EngineState:
        """What the engines are doing, as last heard."""

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""

    async def start(self) -> None:
        """Begin to load; `ready` is set when that is done."""

    async def stop(self) -> None:
        """End everything; what is in flight gets no more updates."""

    def submit(self, ticket: Ticket) -> None:
        """Run a request; its updates go to the ticket's queue, an empty one first when it is accepted."""

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request and free what it holds; nothing happens when it has ended."""


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """The same for prompts that begin alike."""
    return hashlib.sha256(repr(tuple(prompt_ids[:_KEY_TOKENS])).encode()).hexdigest()[:32]


class Submission:
    """Requests of one HTTP call: wait for their acceptance, take (index, update) until all have ended, or close."""

    def __init__(self, worker: Worker, requests: Sequence[Request], conversation: str | None = None) -> None:
        """`conversation`: see `Ticket`; without it, the heads of the prompts decide."""
        self._worker = worker
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._open = {
            n: Ticket(request, self._queue, n, conversation=conversation or prompt_key(request.prompt_ids))
            for n, request in enumerate(requests)
        }
        self._early: deque[tuple[int, Update]] = deque()
        self.count = len(requests)
        self.prompt_tokens = len(requests[0].prompt_ids)
        for ticket in self._open.values():
            worker.submit(ticket)

    @property
    def finished(self) -> bool:
        """All requests have ended, and everything about them was taken."""
        return not self._open

    async def accepted(self) -> None:
        """Wait until the engine has taken or refused every request; what comes with it is kept for `next`."""
        heard: set[int] = set()
        while len(heard) < self.count:
            index, update = await self._queue.get()
            self._early.append((index, update))
            heard.add(index)

    def refusal(self) -> Failure | None:
        """The failure of a request that was refused, after `accepted`."""
        return next((update.failure for _, update in self._early if update.failure is not None), None)

    @property
    def waiting(self) -> bool:
        """`next` has something to give at once."""
        return bool(self._early) or not self._queue.empty()

    async def next(self, patience: float | None = None) -> tuple[int, Update] | None:
        """The next update; None when there is none for `patience` seconds."""
        if self._early:
            index, update = self._early.popleft()
        elif not self._queue.empty():
            index, update = self._queue.get_nowait()
        else:
            try:
                async with asyncio.timeout(patience):
                    index, update = await self._queue.get()
            except TimeoutError:
                return None
        if update.finish_reason is not None or update.failure is not None:
            self._open.pop(index, None)
        return index, update

    def close(self) -> None:
        """Cancel what still runs."""
        for ticket in self._open.values():
            self._worker.cancel(ticket)
        self._open = {}
