"""An engine that hangs without dying, or dies whenever it loads: the server stays awake, and says what is wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

from deadly_engine import build_deadly, build_hanging, build_once  # noqa: E402
from persimmon.serve.server import serve  # noqa: E402
from served import Server, running, service_of  # noqa: E402

FILLER = [5, 6, 7, 8] * 120
"""A prompt; hundreds of them are more than a pipe holds (64 KiB)."""


def pid_of(server: Server) -> int:
    process = server.service.worker.process_id
    assert process is not None
    return process


def ask_for_many(server: Server) -> threading.Thread:
    """Send more than the pipe to the engine can hold, from a client that does not wait."""
    body: dict[str, Any] = {"prompt": [FILLER] * 100, "max_tokens": 2}

    def send() -> None:
        try:
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=3)
        except httpx.TimeoutException:
            return

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_stopped_engine_does_not_stop_the_server() -> None:
    with running(build_deadly, max_queue=1000, drain_seconds=60.0) as server:
        process = pid_of(server)
        os.kill(process, signal.SIGSTOP)
        asking = [ask_for_many(server) for _ in range(3)]
        while server.service.worker.in_flight < 300:
            time.sleep(0.02)
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        server.thread.join(15)
        assert not server.thread.is_alive() and not psutil.pid_exists(process)
        for thread in asking:
            thread.join(20)


def test_a_hung_engine_is_replaced_and_its_requests_go_on() -> None:
    with running(build_deadly) as server:
        worker: Any = server.service.worker
        expected = server.chat(seed=1, max_tokens=60, logit_bias={"1": -100}).json()["choices"][0]["message"]
        worker._silence_seconds = 2.0
        worker._watch_seconds = 0.5
        hung = pid_of(server)
        os.kill(hung, signal.SIGSTOP)
        assert server.chat(seed=1, max_tokens=60, logit_bias={"1": -100}).json()["choices"][0]["message"] == expected
        assert worker.restarts == 1 and pid_of(server) != hung


def test_a_request_that_hangs_two_engines_gets_an_error_and_the_others_are_served() -> None:
    with running(build_hanging) as server:
        worker: Any = server.service.worker
        worker._silence_seconds = 2.0
        worker._watch_seconds = 0.5
        answers: list[int] = []
        other = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=200).status_code))
        other.start()
        bad = server.http.post("/v1/completions", json={"prompt": [1, 319, 5], "max_tokens": 3})
        assert bad.status_code == 503 and bad.json()["error"]["code"] == "engine_failure"
        other.join(100)
        assert answers == [200] and worker.restarts == 2


def test_an_engine_that_dies_whenever_it_loads_is_given_up() -> None:
    said: list[str] = []
    service = service_of(partial(build_once, "/nonexistent/mark"))
    assert serve(service, said.append, log=lambda entry: None) == 1
    assert said == ["the model could not be loaded: the engine's process died 3 times while it loaded the model"]


def test_requests_that_wait_for_a_new_engine_end_when_it_is_given_up(tmp_path: Path) -> None:
    mark = tmp_path / "loaded before"
    mark.touch()
    with running(partial(build_once, str(mark))) as server:
        os.kill(pid_of(server), signal.SIGKILL)
        while server.service.worker.ready.is_set():
            time.sleep(0.01)
        for stream in (False, True):
            answer = server.chat(stream=stream)
            assert answer.status_code == 503 and "while it loaded" in answer.json()["error"]["message"]
