"""64 streaming clients on the shipped model, a third of whom leave midway: no errors, nothing leaked, flat memory.

Ten seconds as a test. The full proof, two minutes (docs/serving.md):

    PERSIMMON_LOAD_SECONDS=120 python -m pytest -s tests/serve/test_load.py
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)
import httpx  # noqa: E402
import psutil  # noqa: E402

SECONDS = float(os.environ.get("PERSIMMON_LOAD_SECONDS", "10"))
CLIENTS = 64
TOPICS = ("a fox", "the sea", "a stack", "bread", "the moon", "a train", "two friends", "rain")
RSS_SLACK = 1.1
"""What the memory after the second quarter may grow to by the end: caches and arenas breathe, a leak does not stop."""
RSS_SLACK_BYTES = 48 << 20
CACHE_TOKENS = 8192
"""Tokens of the key-value cache: 96 MiB of mini's, touched block by block. Requests fill it in the first seconds, so
that what grows later is a leak."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, psutil.Process]]:
    """`persimmon serve mini`, as a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "persimmon.cli.main", "serve", "mini", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen([*command, "--cache-tokens", str(CACHE_TOKENS)], stdin=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 240
        while not ready(url):
            assert process.poll() is None and time.monotonic() < until, "the server did not become ready"
            time.sleep(0.2)
        yield url, psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(30)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


async def client(http: httpx.AsyncClient, number: int, until: float, found: Counter[str]) -> None:
    """One question after the other, with earlier answers in the conversation; every third answer is left unread."""
    chance = random.Random(number)
    while time.monotonic() < until:
        messages = [{"role": "user", "content": f"tell me about {chance.choice(TOPICS)}"}]
        leaves = chance.random() < 1 / 3
        for _ in range(chance.randint(1, 3)):
            body = {"messages": messages, "stream": True, "max_tokens": chance.randint(4, 48), "seed": number}
            text, ending = await answer(http, body, chance.randint(1, 12) if leaves else None)
            found[ending] += 1
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and then"}]


async def answer(http: httpx.AsyncClient, body: dict[str, object], patience: int | None) -> tuple[str, str]:
    """The text, and how it ended: whole, left, or with which error."""
    text, events = "", 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return text, f"status {response.status_code}"
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text, "whole"
            if not line.startswith("data: "):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return text, f"error: {chunk['error']['message']}"
            text += chunk["choices"][0]["delta"].get("content", "")
            events += 1
            if patience is not None and events >= patience:
                return text, "left"
    return text, "cut off"


async def load(url: str, process: psutil.Process) -> tuple[Counter[str], list[int]]:
    """What came of all requests, and the memory of server and engine over time."""
    found: Counter[str] = Counter()
    memory: list[int] = []
    until = time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        clients = [asyncio.create_task(client(http, number, until, found)) for number in range(CLIENTS)]
        while not all(task.done() for task in clients):
            memory.append(sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))
            await asyncio.sleep(SECONDS / 60)
        await asyncio.gather(*clients)
    return found, memory


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"persimmon_{name}{{"))


@pytest.mark.slow
def test_a_crowd_is_served_and_nothing_is_left_behind(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    found, memory = asyncio.run(load(url, process))
    print(f"{dict(found)}; memory {min(memory) >> 20} to {max(memory) >> 20} MiB over {len(memory)} looks")
    assert set(found) <= {"whole", "left"}, "no errors"
    assert found["left"] > 0 and found["whole"] > CLIENTS / 2
    until = time.monotonic() + 60
    while gauge(url, "num_requests_running") + gauge(url, "num_requests_waiting") and time.monotonic() < until:
        time.sleep(0.1)
    assert gauge(url, "kv_cache_usage_perc") == 0, "no block is held"
    assert gauge(url, "engine_restarts_total") == 0 and gauge(url, "request_failure_total") == 0
    quarter = len(memory) // 4
    settled, last = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
    assert last <= settled * RSS_SLACK + RSS_SLACK_BYTES
