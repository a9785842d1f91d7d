"""What happens when the engine's process dies, and when the server is told to end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

from deadly_engine import POISON, build_broken, build_deadly  # noqa: E402
from persimmon.serve.server import serve  # noqa: E402
from scripted_paged import build_scripted  # noqa: E402
from served import CONTEXT, Server, build_engine, running, service_of  # noqa: E402


def streamed(server: Server, seed: int, found: dict[int, list[str]]) -> None:
    body = {"messages": [{"role": "user", "content": "light"}], "stream": True, "max_tokens": 60, "seed": seed}
    body["logit_bias"] = {"1": -100}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        found[seed] = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]


def start(server: Server, seeds: Sequence[int], found: dict[int, list[str]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=streamed, args=(server, seed, found)) for seed in seeds]
    for thread in threads:
        thread.start()
    return threads


def text_of(events: list[str]) -> str:
    assert events[-1] == "[DONE]", events[-1]
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def texts(found: dict[int, list[str]]) -> dict[int, str]:
    return {seed: text_of(events) for seed, events in found.items()}


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(200)


def test_a_killed_engine_is_replaced_and_every_stream_goes_on_to_the_same_end() -> None:
    with running(build_deadly) as server:
        expected: dict[int, list[str]] = {}
        for seed in range(3):
            streamed(server, seed, expected)
        worker = server.service.worker
        computed, killed = worker.state.tokens_computed, worker.process_id
        found: dict[int, list[str]] = {}
        threads = start(server, range(3), found)
        while worker.state.tokens_computed < computed + 60:
            time.sleep(0.005)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        join(threads)
        assert texts(found) == texts(expected)
        assert worker.process_id != killed and worker.restarts == 1
        server.wait_idle()
        assert 'persimmon_engine_restarts_total{model_name="tiny"} 1.0' in server.http.get("/metrics").text


def test_a_request_that_kills_the_engine_is_given_up_and_the_others_are_served() -> None:
    with running(build_deadly) as server:
        found: dict[int, list[str]] = {}
        threads = start(server, range(3), found)
        while server.service.worker.state.running < 3:
            time.sleep(0.005)
        bad = server.http.post("/v1/completions", json={"prompt": [1, POISON, 5], "max_tokens": 3})
        assert bad.status_code == 503 and bad.json()["error"]["code"] == "engine_failure"
        assert "retry-after" in bad.headers
        join(threads)
        assert len(found) == 3 and all(texts(found).values())
        assert server.chat().status_code == 200


def test_requests_for_everything_in_a_full_house() -> None:
    """Longest prompts and answers in a cache that holds only two of them: all are served, in turn."""
    with running(partial(build_engine, num_blocks=2 * CONTEXT // 16)) as server:
        found: list[int] = []

        def ask(length: int) -> None:
            body: dict[str, Any] = {"prompt": [5] * length, "max_tokens": CONTEXT - length}
            answer = server.http.post("/v1/completions", json=body | {"logit_bias": {"1": -100}})
            found.append(answer.json()["usage"]["completion_tokens"])

        threads = [threading.Thread(target=ask, args=(length,)) for length in (400, 450, 500, 400, 490)]
        for thread in threads:
            thread.start()
        join(threads)
        assert sorted(found) == [12, 22, 62, 112, 112]
        server.wait_idle()


def test_one_that_asks_for_all_16k_tokens_in_a_full_house() -> None:
    """A cache of one whole context: who asks for all of it waits and is served, and so is everyone else."""
    most = 16_384
    replies = {"fox": "A fox ran.", "long": "and on " * 300}
    with running(partial(build_scripted, replies, seconds=0.0, num_blocks=most // 16), context=most) as server:
        found: dict[str, Any] = {}

        def ask(name: str, words: str, max_tokens: int) -> None:
            found[name] = server.chat(words, max_tokens=max_tokens).json()

        filler = "hello there " * 700
        room = most - server.http.post("/tokenize", json={"messages": hello(f"long {filler}")}).json()["count"] + 1
        asked = [("all", f"long {filler}", room), *((f"fox {n}", f"fox {n} {filler[: 500 * n]}", 30) for n in range(7))]
        threads = [threading.Thread(target=ask, args=one) for one in asked]
        for thread in threads:
            thread.start()
        over = server.chat(f"long {filler}", max_tokens=room + 1)
        assert over.status_code == 400 and over.json()["error"]["code"] == "context_length_exceeded"
        join(threads)
        texts = {name: answer["choices"][0]["message"]["content"] for name, answer in found.items()}
        assert texts.pop("all") == replies["long"] and len(texts) == 7
        assert set(texts.values()) == {replies["fox"]}
        server.wait_idle()


def test_a_cache_that_is_too_small_for_a_request_says_so() -> None:
    with running(partial(build_engine, num_blocks=8)) as server:
        refused = server.chat(max_tokens=400)
        assert refused.status_code == 400 and "the cache holds" in refused.json()["error"]["message"]
        assert server.chat().status_code == 200
        for fields in ({"max_tokens": None}, {"max_tokens": None, "stream": True}):
            assert server.chat(**fields).status_code == 200, "an answer of no given length takes what there is"


def hello(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    said: list[str] = []
    service = service_of(build_broken)
    assert serve(service, said.append, log=lambda entry: None) == 1
    assert said == ["the model could not be loaded: RuntimeError: no such weights"]


def test_draining_finishes_answers_and_refuses_new_ones() -> None:
    with running(build_deadly) as server:
        found: dict[int, list[str]] = {}
        threads = start(server, [1], found)
        while not server.service.worker.in_flight:
            time.sleep(0.005)
        server.signal(signal.SIGTERM)
        time.sleep(0.1)
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        assert server.chat().status_code == 503
        join(threads)
        assert text_of(found[1])
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_a_second_signal_stops_at_once() -> None:
    with running(build_deadly, drain_seconds=100.0) as server:
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 450}
        with server.http.stream("POST", "/v1/chat/completions", json=body | {"logit_bias": {"1": -100}}) as answer:
            lines = answer.iter_lines()  # kept: without a reader the connection is closed
            next(lines)
            engine = server.service.worker.process_id
            assert engine is not None
            server.signal(signal.SIGTERM)
            server.signal(signal.SIGTERM)
            server.thread.join(10)
            assert not server.thread.is_alive()
            assert server.service.worker.process_id is None and not psutil.pid_exists(engine), "nothing is left behind"


def test_a_long_idle_engine_is_not_taken_for_hung() -> None:
    with running(build_deadly) as server:
        worker = server.service.worker
        server.loop.call_soon_threadsafe(setattr, worker, "_heard_at", time.monotonic() - 1000)
        time.sleep(0.1)
        process = worker.process_id
        body = {"messages": [{"role": "user", "content": "light"}], "max_tokens": 400, "logit_bias": {"1": -100}}
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(server.http.post("/v1/chat/completions", json=body).status_code)
        )
        thread.start()
        while not worker.in_flight:
            time.sleep(0.005)
        assert time.monotonic() - worker._heard_at < 100
        thread.join(100)
        assert done == [200] and worker.process_id == process and worker.restarts == 0
