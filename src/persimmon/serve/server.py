"""Running the application: uvicorn, with a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
import socket
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn

from persimmon.infer.engine import Engine
from persimmon.serve.app import build_app
from persimmon.serve.connections import ConnectionLimits, LimitedConnection, allowed_connections
from persimmon.serve.event_loop import new_event_loop
from persimmon.serve.guard import Guard, write_log
from persimmon.serve.metrics import Metrics
from persimmon.serve.service import Service
from persimmon.serve.settings import ServerSettings
from persimmon.serve.worker import EngineWorker
from persimmon.tokenizer import Tokenizer


def build_service(
    build: Callable[[], Engine], tokenizer: Tokenizer, model: str, context: int, settings: ServerSettings
) -> Service:
    """The service around an engine that `build` makes in its own process."""
    worker = EngineWorker(build)
    return Service(worker, tokenizer, model, context, settings, Metrics(worker, model))


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or Ctrl-C lets running answers end (while /ready says 503), the second stops at once."""

    def __init__(self, service: Service, *, log: Callable[[Mapping[str, Any]], None] = write_log) -> None:
        settings = service.settings
        app = Guard(build_app(service), settings, log=log)
        limits = ConnectionLimits(settings.header_seconds, settings.max_connections or allowed_connections())
        http: Any = functools.partial(LimitedConnection, limits=limits)
        config = uvicorn.Config(
            app,
            host=settings.host, port=settings.port, lifespan="on", access_log=False, log_level="warning",
            timeout_keep_alive=30, server_header=False, timeout_graceful_shutdown=1, ws="none",
            h11_max_incomplete_event_size=65_536, http=http,
        )  # fmt: skip
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until told to end. A forced end skips the application's shutdown, so the engine is ended here too."""
        try:
            await super().serve(sockets)
        finally:
            await self._service.worker.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._draining = asyncio.get_event_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Wait for the answers that are under way, as long as they may take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._service.settings.drain_seconds):
                while self._service.worker.in_flight:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)  # the last bytes are on their way
        self.should_exit = True


async def announce(service: Service, say: Callable[[str], None]) -> None:
    """Say when the model has loaded, or why it has not."""
    while service.worker.failed is None and not service.worker.ready.is_set():
        await asyncio.sleep(0.05)
    if service.worker.failed is not None:
        say(f"the model could not be loaded: {service.worker.failed}")
        signal.raise_signal(signal.SIGTERM)
        return
    gc.freeze()  # modules and tokenizer stay: no collection looks at them again
    url = f"http://{service.settings.host}:{service.settings.port}"
    say(f"{service.model} on the {service.worker.engine_name} engine: chat page {url}/  API {url}/v1  (Ctrl-C stops)")


def serve(service: Service, say: Callable[[str], None], *, log: Callable[[Mapping[str, Any]], None]) -> int:
    """Run until stopped; the exit code."""

    async def main() -> None:
        server = DrainingServer(service, log=log)
        speaking = asyncio.create_task(announce(service, say))
        await server.serve()
        speaking.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
    return 1 if service.worker.failed is not None else 0
