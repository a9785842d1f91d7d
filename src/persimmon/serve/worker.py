"""The engine in a process of its own, and the server's end of the pipe.

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
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection

from persimmon.errors import ContextLengthError, PersimmonError, UnavailableError
from persimmon.infer.engine import Engine, EngineState, Failure, Request, Update
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


@dataclass(frozen=True)
class Progress:
    """What a step, or the arrival of requests, brought."""

    updates: tuple[Update, ...]
    state: EngineState


Message = Ready | Broken | Progress
Command = Request | str
"""A request to run, or the id of one to cancel."""


def run_worker(build: Callable[[], Engine], commands: Connection, events: Connection) -> None:
    """The process: load, then take commands and make steps until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both go to the whole group; the server drains, then ends this one
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = build()
    except Exception as error:
        events.send(Broken(f"{type(error).__name__}: {error}"))
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        events.send(Ready(engine.name, engine.capacity))
        while True:
            news = list(_take_commands(engine, commands))
            if engine.busy:
                news += engine.step()
            events.send(Progress(tuple(news), engine.state))


def _take_commands(engine: Engine, commands: Connection) -> list[Update]:
    """All commands that wait; without work, wait for one."""
    answers: list[Update] = []
    patience = 0 if engine.busy else None
    while commands.poll(patience):
        command: Command = commands.recv()
        patience = 0  # whatever it was, its effect is reported before the next wait
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


class _Outbox:
    """Commands on their way to a process.

    A thread sends them: a pipe that a hung process lets fill up holds up this thread alone, never the event loop, and
    the death of the process ends it.
    """

    def __init__(self, commands: Connection) -> None:
        self._commands = commands
        self._waiting: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._send_all, name="persimmon-commands", daemon=True).start()

    def put(self, command: Command) -> None:
        """Send after all that was put before; what the process does not live to take is dropped."""
        self._waiting.put(command)

    def close(self) -> None:
        """Nothing more will come."""
        self._waiting.put(None)

    def _send_all(self) -> None:
        # A process that just died is noticed by the reader of its events, which starts the next one.
        with contextlib.suppress(OSError), contextlib.closing(self._commands):
            while (command := self._waiting.get()) is not None:
                self._commands.send(command)


class EngineWorker:
    """Starts the engine's process, passes requests to it, and replaces it when it dies. One event loop."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        """`build` is called in the process, so it must be picklable."""
        self._build = build
        self._silence_seconds, self._watch_seconds = _SILENCE_SECONDS, _WATCH_SECONDS
        self._tickets: dict[str, Ticket] = {}
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._outbox: _Outbox | None = None
        self._loading_deaths = 0
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self._loop = asyncio.get_running_loop()
        # At exit, multiprocessing sends its children SIGTERM, which this one ignores, and waits for them.
        atexit.register(self._kill)
        self._start_process()
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
        assert self._outbox is not None, "a ready process has a pipe"
        self._outbox.put(command)

    def _start_process(self) -> None:
        self.ready.clear()
        self._heard_at = time.monotonic()
        receive_commands, send_commands = self._context.Pipe(duplex=False)
        events, send_events = self._context.Pipe(duplex=False)
        self._process = self._context.Process(
            target=run_worker, args=(self._build, receive_commands, send_events), name="persimmon-engine", daemon=True
        )
        self._process.start()
        receive_commands.close()
        send_events.close()
        self._outbox = _Outbox(send_commands)
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: Connection) -> None:
        """In a thread: hand every message to the event loop, and the end too."""
        assert self._loop is not None, "started"
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._receive, events.recv())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._died)

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
        if self._outbox is not None:
            self._outbox.close()
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
        self._start_process()

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
