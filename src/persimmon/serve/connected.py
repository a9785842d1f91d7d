"""Work for a client that may go away: it is stopped then, so that nothing is computed for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from persimmon.serve.guard import CLIENT_GONE
from persimmon.serve.service import ApiError
from persimmon.serve.submission import Submission

T = TypeVar("T")


class ClientDisconnected(ApiError):
    """Nobody waits for the answer."""


async def until_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected(499, CLIENT_GONE, "invalid_request_error")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the engine's work stops when the client goes away, or stops reading."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], submission: Submission, note_end: Callable[[str | None], None]
    ) -> None:
        """`note_end` is called at the end, with what cut the answer short."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._submission, self._note_end = events, submission, note_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client is gone."""
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            self._note_end(CLIENT_GONE if not pump.done() else None)
            self._submission.close()
            for task in (pump, gone):
                task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
