"""Messages between the server and its engine's process, over a pair of sockets: pickled, each behind its length.

The server's end belongs to the event loop and never blocks it, whatever the other process does: what a hung process
does not read waits in memory. The engine's end is for a plain loop. No threads on either side.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, cast

_LENGTH = struct.Struct("!Q")

_READ_BYTES = 1 << 18


def _framed(message: Any) -> bytes:
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


class _Frames:
    """Cuts what arrives into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete now."""
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._pending)[0]
            if len(self._pending) < end:
                return
            content = bytes(self._pending[_LENGTH.size : end])
            del self._pending[:end]
            yield pickle.loads(content)


class EngineEnd:
    """In the engine's process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._frames = connection, _Frames()

    def send(self, message: Any) -> None:
        """Returns when the message is on its way; OSError when the server is gone."""
        self._connection.sendall(_framed(message))

    def receive(self, *, wait: bool) -> list[Any]:
        """What has come; with `wait`, at least one message. EOFError when the server is gone."""
        messages: list[Any] = []
        while True:
            try:
                data = self._connection.recv(_READ_BYTES, 0 if wait and not messages else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not data:
                raise EOFError("the server has closed its end")
            messages += self._frames.feed(data)


class ServerEnd(asyncio.Protocol):
    """In the server, on its event loop."""

    def __init__(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """`on_end`: the process is gone."""
        self._on_message, self._on_end, self._frames = on_message, on_end, _Frames()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, connection: socket.socket, on_message: Callable[[Any], None], on_end: Callable[[], None]
    ) -> ServerEnd:
        """The end of a connection whose other end a process has."""
        loop = asyncio.get_running_loop()
        _, end = await loop.create_connection(lambda: cls(on_message, on_end), sock=connection)
        return end

    def send(self, message: Any) -> None:
        """Send after all that was sent before; what the process does not live to take is dropped."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_framed(message))

    def close(self) -> None:
        """Drop what waits to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        for message in self._frames.feed(data):
            self._on_message(message)

    def eof_received(self) -> None:
        """Called by asyncio: nobody is left to take what waits."""
        self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._on_end()
