"""Connections and what a client may do with one before its request is complete: wait a little, and not fill the house.

uvicorn limits neither the time for the header of a request nor, before an answer is due, the number of connections:
a few hundred clients that send half a line each would use up the descriptors of the process.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_FILES = 65_536
"""Descriptors that are asked for, where the system allows them."""

_RESERVED_FILES = 64
"""Descriptors for everything but connections: pipes, the page's files, libraries."""

_FEWEST = 8


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take."""

    header_seconds: float
    """From the first byte that is waited for to the end of the header."""
    most: int
    """At a time; above it, the one that has waited longest for a header makes room."""


def allowed_connections() -> int:
    """As many as the process may have descriptors for; its limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return _MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return max(_FEWEST, (most if soft == resource.RLIM_INFINITY else soft) - _RESERVED_FILES)


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 with these limits. `scope["state"]["abort"]` drops the connection with all that is unsent."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._waiting: asyncio.TimerHandle | None = None
        self._waits_since = time.monotonic()
        self._inner, self.app = self.app, self._with_abort

    async def _with_abort(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["abort"] = self.transport.abort
        await self._inner(scope, receive, send)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._limits.most:
            idle = [c for c in self.connections if isinstance(c, LimitedConnection) and not c._answering]
            min(idle, key=lambda connection: connection._waits_since, default=self)._drop()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        if self._answering:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by uvicorn, which waits for the next request's first byte with a time limit of its own."""
        self._waits_since = time.monotonic()
        super().on_response_complete()

    def _wait(self) -> None:
        self._waits_since = time.monotonic()
        self._waiting = self.loop.call_later(self._limits.header_seconds, self._drop)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _drop(self) -> None:
        self._stop_waiting()
        self.connections.discard(self)  # at once, not when the loop comes to it: the next one counts
        self.transport.abort()
