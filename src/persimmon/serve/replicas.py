"""Several engines behind one endpoint: the server's application as a Ray Serve deployment.

    serve run configs/ray-serve.yaml

Two deployments. `Front` is the application of `persimmon serve`: it checks, encodes, answers, counts; one replica is
enough, for it runs no model. `EngineReplica` runs an engine as the server on one machine does, in a process of its own
below the replica's, which is replaced when it dies. Requests of one conversation go to the replica that holds its
prefix: Ray's consistent hashing over `Ticket.conversation`, and on to the next replica only while that one is full.
When a replica is lost, the requests that ran on it end with an error (503, or an error event in a stream), all others
go on, and Ray starts another one.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from persimmon.infer.engine import EngineState, Failure, Request, Update
from persimmon.serve.app import build_app
from persimmon.serve.build import EngineSettings
from persimmon.serve.guard import Guard, Receive, Scope, Send
from persimmon.serve.metrics import Metrics
from persimmon.serve.protocol import error_body
from persimmon.serve.replica_settings import ReplicaSettings
from persimmon.serve.service import Service
from persimmon.serve.settings import ServerSettings, is_loopback, read_keys
from persimmon.serve.submission import Submission, Ticket
from persimmon.serve.worker import EngineWorker

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

_log = logging.getLogger(__name__)

LOST = "the engine that worked on this request was lost; another is being started: send the request again"

LOOK_SECONDS = 2.0
"""Between two looks of the front at which replicas are still there: one that dies idle is missed by no request."""

_SPARE_PLACES = 64
"""Calls of the front beside the requests that run or wait: pages, metrics, health, refusals."""

Report = tuple[str, Update, EngineState]
"""The actor name of a replica, what is new about a request, and what its engine is doing."""


class EngineReplica:
    """One engine. Requests in, updates out."""

    async def __init__(self, build: EngineSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Returns when the model has loaded. RuntimeError, which Ray reports, when it cannot be."""
        name = ray.get_runtime_context().get_actor_name()
        assert name is not None, "Serve gives its replicas names"
        self._name = name
        self._worker = EngineWorker(build)
        await self._worker.start()
        while not self._worker.ready.is_set():
            self.check_health()
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if self._worker.failed is not None:
            raise RuntimeError(f"the model could not be loaded: {self._worker.failed}")

    async def describe(self) -> dict[str, Any]:
        """What answers here."""
        return {
            "engine": self._worker.engine_name,
            "capacity": self._worker.capacity,
            "replica": self._name,
            "process": os.getpid(),
        }

    async def generate(self, request: Request) -> AsyncIterator[Report]:
        """Run a request; it stops before the next step when the caller goes away."""
        submission = Submission(self._worker, [request])
        try:
            while not submission.finished:
                item = await submission.next()
                assert item is not None, "without a limit it waits"
                yield self._name, item[1], self._worker.state
        finally:
            submission.close()


class ReplicatedEngine:
    """The front's view of all engines: a `serve.submission.Worker` over Ray."""

    def __init__(self, engines: DeploymentHandle[Any]) -> None:
        """`engines` is the handle of the `EngineReplica` deployment."""
        self._engines = engines
        self._tickets: dict[str, Ticket] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._states: dict[str, EngineState] = {}  # as last heard, by replica
        self._tasks: list[asyncio.Task[None]] = []
        self.ready = asyncio.Event()
        self.failed: str | None = None
        self.restarts = 0
        self.engine_name = ""
        self.capacity: int | None = None
        self.on_update: Any = lambda ticket, update: None
        self.on_cancel: Any = lambda ticket: None

    @property
    def state(self) -> EngineState:
        """Of all replicas together, each as it was last heard of."""
        return combined(list(self._states.values()))

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    async def start(self) -> None:
        """`ready` is set when the first replica has loaded."""
        self._tasks = [asyncio.create_task(self._wait_ready()), asyncio.create_task(self._keep_looking())]

    async def _wait_ready(self) -> None:
        while not self.ready.is_set():
            try:
                found = await self._engines.describe.remote()
                self.engine_name, self.capacity = found["engine"], found["capacity"]
                self.ready.set()
            except Exception:  # a replica that died while it loaded; the next answers
                await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """Give up everything that runs."""
        for task in self._tasks:
            task.cancel()
        for ticket in list(self._tickets.values()):
            self.cancel(ticket)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for replica in list(self._states):
                if not await asyncio.to_thread(is_there, replica):
                    self._forget(replica)

    def _forget(self, replica: str) -> None:
        """A replica is gone: what it did last is no longer counted."""
        if self._states.pop(replica, None) is not None:
            self.restarts += 1

    def submit(self, ticket: Ticket) -> None:
        """Run a request on the replica of its conversation."""
        self._tickets[ticket.request.id] = ticket
        # In a context of its own: Ray would give all calls under one HTTP request the same id, and its router tells
        # waiting calls apart by that id.
        run = asyncio.create_task(self._run(ticket), context=contextvars.Context())
        self._runs[ticket.request.id] = run

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; nothing happens when it has ended."""
        if self._tickets.pop(ticket.request.id, None) is None:
            return
        self.on_cancel(ticket)
        self._runs.pop(ticket.request.id).cancel()

    async def _run(self, ticket: Ticket) -> None:
        """Pass on what the replica says, to the end or the replica's."""
        replica = ""
        handle = self._engines.options(session_id=ticket.conversation, stream=True)
        reports: Any = handle.generate.remote(ticket.request)
        try:
            async for replica, update, state in reports:
                self._states[replica] = state
                self._deliver(ticket, update)
            message = "the engine said nothing more about this request"
        except ray.exceptions.RayActorError:
            self._forget(replica)
            message = LOST
        except Exception as error:
            _log.exception("request %s", ticket.request.id)
            message = f"the engine could not be asked: {reason_of(error)}"
        finally:
            reports.cancel()
        self._deliver(ticket, Update(ticket.request.id, failure=Failure(message, "engine")))

    def _deliver(self, ticket: Ticket, update: Update) -> None:
        """Hand over an update of a request that has not ended."""
        if ticket.request.id not in self._tickets:
            return
        if update.finish_reason is not None or update.failure is not None:
            del self._tickets[ticket.request.id], self._runs[ticket.request.id]
        self.on_update(ticket, update)
        ticket.updates.put_nowait((ticket.index, update))


def reason_of(error: Exception) -> str:
    """What went wrong in a replica, without the traceback that Ray puts before it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().rpartition(chr(10))[2]}"


def is_there(replica: str) -> bool:
    """Whether the actor of a replica lives, or may live: a question that gets no answer says nothing."""
    try:
        ray.get_actor(replica, namespace=SERVE_NAMESPACE)
    except ValueError:  # Ray's answer for a name that no living actor has
        return False
    except Exception:
        return True
    return True


def combined(states: Sequence[EngineState]) -> EngineState:
    """Counts added up, the share of active values averaged over the engines that report it."""
    names = [name for name in EngineState._fields if name != "active_fraction"]
    counts = {name: sum(getattr(state, name) for state in states) for name in names}
    layers = [state.active_fraction for state in states if state.active_fraction]
    active = tuple(sum(shares) / len(layers) for shares in zip(*layers, strict=True))
    return EngineState(**counts, active_fraction=active)


class Front:
    """The application of `persimmon serve`, in front of all engines."""

    def __init__(self, settings: ReplicaSettings, engines: DeploymentHandle[Any]) -> None:
        """Reads the tokenizer; the model is loaded by the engines alone."""
        from persimmon.checkpoints.download import model_config, resolve
        from persimmon.tokenizer import Tokenizer

        config = model_config(settings.model)
        config.check_context(settings.context)
        directory = resolve(settings.model)
        worker, name = ReplicatedEngine(engines), settings.served_model_name or Path(settings.model).name
        context = settings.context or config.max_positions
        self._settings = server_settings(settings)
        self._service = Service(
            worker, Tokenizer.load(directory), name, context, self._settings, Metrics(worker, name)
        )  # fmt: skip

    def __serve_build_asgi_app__(self) -> Any:
        return PublicNeedsKey(Guard(build_app(self._service), self._settings), self._settings)


class PublicNeedsKey:
    """Refuses what arrives at a public address while no key is set: Ray binds the port, from its own configuration."""

    def __init__(self, app: Any, settings: ServerSettings) -> None:
        self._app = app
        self._open = bool(settings.api_keys) or settings.allow_public_without_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403."""
        server = scope.get("server") or ("", 0)
        if scope["type"] != "http" or self._open or is_loopback(server[0]):
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        message = f"the address {server[0]} can be reached from outside: set PERSIMMON_API_KEY or api_key_file"
        await JSONResponse(error_body(message, "permission_error"), 403)(scope, receive, send)


def server_settings(settings: ReplicaSettings) -> ServerSettings:
    """What the front allows; Ray binds its port."""
    keys: tuple[str, ...] = ()
    if settings.api_key_file is not None:
        keys = read_keys(Path(settings.api_key_file).read_text().splitlines())
    if not keys and os.environ.get("PERSIMMON_API_KEY"):
        keys = (os.environ["PERSIMMON_API_KEY"],)
    # Where others may come in, names are judged as on a public address of one's own.
    public = bool(keys) or settings.allow_public_without_key
    return ServerSettings(
        host="0.0.0.0" if public else "127.0.0.1",
        api_keys=keys,
        allow_public_without_key=settings.allow_public_without_key,
        allowed_hosts=tuple(settings.allowed_hosts),
        max_concurrency=settings.max_concurrency * settings.replicas,
        max_queue=settings.max_queue,
        max_body_bytes=settings.max_body_bytes,
        request_seconds=settings.request_seconds,
    )


def build(args: Mapping[str, Any]) -> Any:
    """The Ray Serve application that a configuration file's `args` describe; ValidationError names what is wrong."""
    settings = ReplicaSettings.model_validate(dict(args))
    places = settings.max_concurrency * settings.replicas + settings.max_queue + _SPARE_PLACES
    engines: Any = serve.deployment(
        EngineReplica,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_concurrency,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=settings.health_check_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,  # type: ignore[arg-type]
            request_router_kwargs={"num_fallback_replicas": settings.replicas - 1},
        ),
    )
    front: Any = serve.deployment(
        serve.ingress()(Front), num_replicas=1, max_ongoing_requests=places, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(settings, engines.bind(settings.engine()))
