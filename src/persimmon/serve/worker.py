"""The engine in a process of its own, and the server's side of it.

A process rather than a thread: a step of the model never holds up the server's event loop, and if the process dies
(killed, out of memory, a bug in native code) the server lives. Every request then goes on in the next process: the
server knows its prompt, its seed and the tokens it was sent, and the engine takes it up there (`Request.replayed`),
to the same answer. The requests that saw the process die are sent to the next one by one: whichever kills it again,
now alone, ends with an error, and the others are not lost.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import NamedTuple

from persimmon.errors import ContextLengthError, PersimmonError, UnavailableError
from persimmon.infer.engine import Engine, EngineState, Failure, Request, Update
from persimmon.serve.channel import EngineEnd, ServerEnd
from persimmon.serve.submission import Ticket

MAX_DEATHS = 2
"""Processes that may die under a request, without a token in between, before it is given up."""

MAX_LOADING_DEATHS = 3
"""Processes in a row that may die before they have loaded the model; then it is given up."""

_SILENCE_SECONDS = 300.0
"""A process that has work and says nothing for so long is taken for hung, and killed."""

_RESTART_PAUSE_SECONDS = 0.5
_WATCH_SECONDS = 5.0
"""Between two looks at how long the process has been silent."""


@dataclass(frozen=True)
class Ready:
    """The process has loaded the model."""

    engine_name: str
    capacity: int
    """Tokens that its cache holds."""


@dataclass(frozen=True)
class Broken:
    """The process could not load the model."""

    message: str


class Progress(NamedTuple):
    """What a step, or the arrival of requests, brought."""

    updates: tuple[Update, ...]
    state: EngineState


Message = Ready | Broken | Progress
Command = Request | str
"""A request to run, or the id of one to cancel."""


def run_worker(build: Callable[[], Engine], connection: socket.socket) -> None:
    """The process: load, then take commands and make steps until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both go to the whole group; the server drains, then ends this one
        signal.signal(number, signal.SIG_IGN)
    server = EngineEnd(connection)
    try:
        engine = build()
    except Exception as error:
        server.send(Broken(f"{type(error).__name__}: {error}"))
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        gc.freeze()  # what loading left behind stays: no collection looks at it again
        server.send(Ready(engine.name, engine.capacity))
        while True:
            news = _obey(engine, server.receive(wait=not engine.busy))
            if engine.busy:
                news += engine.step()
            server.send(Progress(tuple(news), engine.state))


def _obey(engine: Engine, commands: list[Command]) -> list[Update]:
    """Carry out commands; an update for every request that was taken or refused."""
    answers: list[Update] = []
    for command in commands:
        if isinstance(command, str):
            engine.cancel(command)
            continue
        try:
            engine.submit(command)
            answers.append(Update(command.id))
        except PersimmonError as error:
            kind = "context" if isinstance(error, ContextLengthError) else "input"
            if isinstance(error, UnavailableError):
                kind = "engine"
            answers.append(Update(command.id, failure=Failure(str(error), kind)))  # type: ignore[arg-type]
    return answers


class EngineWorker:
    """Starts the engine's process, passes requests to it, and replaces it when it dies. One event loop."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        """`build` is called in the process, so it must be picklable."""
        self._build = build
        self._silence_seconds, self._watch_seconds = _SILENCE_SECONDS, _WATCH_SECONDS
        self._tickets: dict[str, Ticket] = {}
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._channel: ServerEnd | None = None
        self._loading_deaths = 0
        self._heard_at = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.state = EngineState()
        self.ready = asyncio.Event()
        self.failed: str | None = None
        """Why the model could not be loaded."""
        self.restarts = 0
        self.engine_name = ""
        self.capacity: int | None = None
        self.on_update: Callable[[Ticket, Update], None] = lambda ticket, update: None
        """Called for every update: metrics."""
        self.on_cancel: Callable[[Ticket], None] = lambda ticket: None

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    @property
    def process_id(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the first process; `ready` is set when it has loaded."""
        # At exit, multiprocessing sends its children SIGTERM, which this one ignores, and waits for them.
        atexit.register(self._kill)
        await self._start_process()
        self._run_task(self._watch())

    async def stop(self) -> None:
        """End the process; what is in flight gets no more updates. A second call does nothing."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        process = self._process
        self._kill()
        if process is not None:
            await asyncio.to_thread(process.join, 5)
        if self._channel is not None:
            self._channel.close()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        """End the process now: it holds nothing that could be lost."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def submit(self, ticket: Ticket) -> None:
        """Run a request; its updates go to the ticket's queue, an empty one first when it is accepted."""
        if not self._tickets:
            self._heard_at = time.monotonic()  # the silence of an idle process is no sign of hanging
        self._tickets[ticket.request.id] = ticket
        self._send_tickets()

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; the engine frees what it holds before its next step."""
        if self._tickets.pop(ticket.request.id, None) is None:
            return
        self.on_cancel(ticket)
        if ticket.sent:
            self._send(ticket.request.id)
            self._send_tickets()

    def _send_tickets(self) -> None:
        """Send what the process does not have yet: suspects one at a time, then everything."""
        waiting = [ticket for ticket in self._tickets.values() if not ticket.sent]
        on_probation = any(ticket.sent and ticket.deaths for ticket in self._tickets.values())
        if not self.ready.is_set() or on_probation:
            return
        suspects = [ticket for ticket in waiting if ticket.deaths]
        for ticket in suspects[:1] or waiting:
            ticket.sent = True
            self._send(ticket.rest())

    def _send(self, command: Command) -> None:
        assert self._channel is not None, "a ready process has a channel"
        self._channel.send(command)

    async def _start_process(self) -> None:
        self.ready.clear()
        self._heard_at = time.monotonic()
        ours, theirs = socket.socketpair()
        self._process = self._context.Process(
            target=run_worker, args=(self._build, theirs), name="persimmon-engine", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process closes the connection
        self._channel = await ServerEnd.open(ours, self._receive, self._died)

    def _receive(self, message: Message) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, Ready):
            self.engine_name, self.capacity, self._loading_deaths = message.engine_name, message.capacity, 0
            self.ready.set()
            self._send_tickets()
        elif isinstance(message, Broken):
            self.failed = message.message
        else:
            self.state = message.state
            for update in message.updates:
                self._deliver(update)

    def _deliver(self, update: Update) -> None:
        ticket = self._tickets.get(update.request_id)
        if ticket is None:
            return  # cancelled meanwhile
        if update.piece is not None:
            ticket.answered.append(update.piece)
        ended = update.finish_reason is not None or update.failure is not None
        if ended:
            del self._tickets[update.request_id]
        self.on_update(ticket, update)
        ticket.updates.put_nowait((ticket.index, update))
        if ticket.deaths and (ended or update.piece is not None):
            ticket.deaths = 0
            self._send_tickets()

    def _died(self) -> None:
        """The process is gone: give up what it died of, and start the next."""
        if self._stopping:
            return
        if self.failed is None and not self.ready.is_set():
            self._loading_deaths += 1
            if self._loading_deaths >= MAX_LOADING_DEATHS:
                self.failed = f"the engine's process died {self._loading_deaths} times while it loaded the model"
        self.ready.clear()
        self.state = EngineState()
        for ticket in list(self._tickets.values()):
            ticket.deaths += ticket.sent
            ticket.sent = False
            if self.failed is not None or ticket.deaths >= MAX_DEATHS:
                message = self.failed or "the engine stopped twice while it worked on this request"
                self._deliver(Update(ticket.request.id, failure=Failure(message, "engine")))
        if self.failed is None:
            self.restarts += 1
            self._run_task(self._restart())

    async def _restart(self) -> None:
        await asyncio.sleep(_RESTART_PAUSE_SECONDS)
        await self._start_process()

    async def _watch(self) -> None:
        """Kill a process that hangs; the reader then starts another."""
        while True:
            await asyncio.sleep(self._watch_seconds)
            silent = time.monotonic() - self._heard_at
            if self._tickets and self.ready.is_set() and silent > self._silence_seconds and self._process is not None:
                self._process.kill()

    def _run_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
