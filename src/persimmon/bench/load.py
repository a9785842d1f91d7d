"""A load generator for OpenAI-compatible servers: clients that stream completions one after the other. No torch.

It speaks HTTP itself, over one connection per request, because it shares the processor with the server it measures.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from persimmon.errors import InputError
from persimmon.serve.event_loop import new_event_loop

_OPEN_SECONDS = 30.0  # most time for a connection
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


def address_of(url: str) -> Address:
    """Host and port of `http://host:port`; InputError for anything else."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path not in ("", "/"):
        raise InputError(f"a server is given as http://HOST:PORT, got {url!r}")
    return Address(parts.hostname, port)


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    clients: int
    seconds: float
    prompts: Sequence[Sequence[int]]
    """Token ids; every request takes one of them."""
    max_tokens: int
    model: str
    disconnects: float = 0.0
    """Share of the requests whose client leaves in the middle of the answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.disconnects <= 1:
            raise InputError(f"disconnects must be a share from 0 to 1, got {self.disconnects}")
        for name in ("clients", "seconds", "max_tokens"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass
class Outcome:
    """What all clients saw together."""

    seconds: float = 0.0
    tokens: int = 0
    finished: int = 0
    """Requests answered to the end."""
    dropped: int = 0
    """Requests whose client left on purpose."""
    errors: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    """Seconds from the request to its first piece of text."""
    between: list[float] = field(default_factory=list)
    """Seconds between neighbouring pieces of one answer."""

    @property
    def tokens_per_second(self) -> float:
        """Of all clients together."""
        return self.tokens / self.seconds


def run_load(address: Address, load: Load) -> Outcome:
    """Let the clients ask for `load.seconds`, then hang up."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run(address, load))


async def _run(address: Address, load: Load) -> Outcome:
    outcome = Outcome()
    started = time.perf_counter()
    clients = [asyncio.create_task(_client(address, load, number, outcome)) for number in range(load.clients)]
    await asyncio.wait(clients, timeout=load.seconds)
    outcome.seconds = time.perf_counter() - started
    for client in clients:
        client.cancel()
    for result in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(result, Exception):
            outcome.errors.append(f"{type(result).__name__}: {result}")
    return outcome


async def _client(address: Address, load: Load, number: int, outcome: Outcome) -> None:
    """Ask, read the answer, ask again, until cancelled."""
    chance = random.Random(load.seed * 100_003 + number)
    turn = number
    while True:
        body = {
            "model": load.model,
            "prompt": list(load.prompts[turn % len(load.prompts)]),
            "max_tokens": load.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        leave = chance.randrange(1, max(2, load.max_tokens)) if chance.random() < load.disconnects else None
        try:
            await _ask(address, body, leave, outcome)
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
            outcome.errors.append(f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(0.05)  # a server that is down is not asked without pause
        turn += load.clients


async def _ask(address: Address, body: dict[str, Any], leave: int | None, outcome: Outcome) -> None:
    """One request; its client leaves after `leave` pieces."""
    started = last = time.perf_counter()
    pieces = 0
    async for event in stream(address, "/v1/completions", body):
        now = time.perf_counter()
        if "error" in event:
            raise ValueError(f"an error in the stream: {event['error']}")
        if any(choice.get("text") for choice in event.get("choices", ())):
            (outcome.first_token if pieces == 0 else outcome.between).append(now - (started if pieces == 0 else last))
            pieces, last = pieces + 1, now
            outcome.tokens += 1
            if pieces == leave:
                outcome.dropped += 1
                return
        if event.get("usage"):
            outcome.tokens += int(event["usage"]["completion_tokens"]) - pieces  # tokens without text of their own
    outcome.finished += 1


async def stream(address: Address, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer. Raises ValueError for a refusal; leaving early closes the connection."""
    async with asyncio.timeout(_OPEN_SECONDS):  # wait_for of Python 3.11 can swallow the cancellation of a client
        reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        data = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )
        await writer.drain()
        await _check_status(reader)
        chunked, pending = _ChunkedBody(), b""
        while data := await reader.read(_READ_BYTES):
            *events, pending = (pending + chunked.feed(data)).split(b"\n\n")
            for event in events:
                text = event.removeprefix(b"data: ").strip()
                if text == b"[DONE]":
                    return
                if event.startswith(b"data: "):
                    yield json.loads(text)
            if chunked.ended:
                break
        raise ValueError("the stream ended without [DONE]")
    finally:
        writer.close()


async def _check_status(reader: asyncio.StreamReader) -> None:
    """Read the head of the answer; ValueError unless it is a chunked 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = head.split(" ", 2)[1]
    if status != "200":
        raise ValueError(f"status {status}: {(await reader.read(300)).decode(errors='replace')}")
    if "transfer-encoding: chunked" not in head.lower():
        raise ValueError("the answer is not a stream")


class _ChunkedBody:
    """Takes the frames off a chunked body as it comes: one turn of the event loop, however many chunks have come."""

    def __init__(self) -> None:
        self._pending = b""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The content of the chunks that are complete now."""
        data, start = self._pending + data, 0
        parts: list[bytes] = []
        while (head := data.find(b"\r\n", start)) >= 0:
            end = head + 2 + int(data[start:head], 16)
            self.ended = end == head + 2
            if self.ended or len(data) < end + 2:
                break
            parts.append(data[head + 2 : end])
            start = end + 2
        self._pending = data[start:]
        return b"".join(parts)
