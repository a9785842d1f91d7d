"""A server over the tiny model for tests: a real uvicorn and a real engine process, on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import httpx

from persimmon.infer.block_cache import PagedReference
from persimmon.infer.engine import Engine
from persimmon.serve.event_loop import new_event_loop
from persimmon.serve.server import DrainingServer, build_service
from persimmon.serve.service import Service
from persimmon.serve.settings import ServerSettings
from persimmon.tokenizer import Tokenizer
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

CONTEXT = 512
KEY = "test-key-0123456789"


def build_engine(
    num_blocks: int = 128, max_running: int = 8, normalizer: Mapping[str, bool] = MappingProxyType({})
) -> Engine:
    """Runs in the engine's process."""
    model = tiny_model(max_positions=CONTEXT)
    return Engine(PagedReference(model, num_blocks, 16), tiny_tokenizer(**normalizer), max_running=max_running)


class Server:
    """A running server: its address, its service and its log."""

    def __init__(
        self, uvicorn_server: DrainingServer, service: Service, url: str, log: list[Mapping[str, Any]]
    ) -> None:
        self.service, self.url, self.log = service, url, log
        self._server = uvicorn_server
        self.loop = new_event_loop()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(uvicorn_server.serve()), daemon=True)
        self.http = httpx.Client(base_url=url, timeout=120)

    def chat(self, text: str = "the story", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def signal(self, number: int) -> None:
        """As if the process got this signal."""
        self.loop.call_soon_threadsafe(self._server.handle_exit, number, None)

    def wait_idle(self, seconds: float = 60) -> None:
        """Until no request is in flight and no block is held."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.service.worker.in_flight and not self.service.worker.state.blocks_held:
                return
            time.sleep(0.02)
        raise AssertionError(f"not idle: {self.service.worker.in_flight} in flight, {self.service.worker.state}")


def service_of(
    build: Callable[[], Engine], context: int = CONTEXT, tokenizer: Tokenizer | None = None, name: str = "tiny",
    **settings: Any,
) -> Service:  # fmt: skip
    """A service on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = ServerSettings(port=port, **{"max_concurrency": 8, "drain_seconds": 5.0, **settings})
    return build_service(build, tokenizer or tiny_tokenizer(), name, context, chosen)


@contextlib.contextmanager
def running(build: Any = None, **settings: Any) -> Iterator[Server]:
    """A server in a thread; stopped at the end."""
    service = service_of(build or build_engine, **settings)
    log: list[Mapping[str, Any]] = []
    server = DrainingServer(service, log=log.append)
    found = Server(server, service, f"http://127.0.0.1:{service.settings.port}", log)
    found.thread.start()
    try:
        _wait_ready(found, found.thread)
        yield found
        found.http.close()
    finally:
        server.should_exit = True
        found.thread.join(20)


def _wait_ready(server: Server, thread: threading.Thread) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    until = time.monotonic() + 240
    while time.monotonic() < until and thread.is_alive():
        with contextlib.suppress(httpx.HTTPError):
            if server.http.get("/ready", headers=headers).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")
