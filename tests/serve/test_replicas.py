"""Two replicas of the shipped model behind one endpoint, on a Ray of this machine; one of them is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai", "httpx"):
    pytest.importorskip(package)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs the extra packages of persimmon[ray]")
serve = pytest.importorskip("ray.serve")
import httpx  # noqa: E402
import psutil  # noqa: E402

from openai_suite import OpenAISuite, Served  # noqa: E402
from persimmon.api import load  # noqa: E402
from persimmon.checkpoints.download import resolve  # noqa: E402
from persimmon.infer.engine import EngineState  # noqa: E402
from persimmon.infer.paged import page  # noqa: E402
from persimmon.serve.protocol import ChatRequest  # noqa: E402
from persimmon.serve.replica_settings import ReplicaSettings  # noqa: E402
from persimmon.serve.replicas import LOST, PublicNeedsKey, combined, reason_of, server_settings  # noqa: E402
from persimmon.serve.settings import ServerSettings  # noqa: E402
from persimmon.tokenizer import Tokenizer  # noqa: E402

CONFIG = Path(__file__).parents[2] / "configs" / "ray-serve.yaml"
OBJECT_STORE_BYTES = 100 << 20
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ray(tries: int = 3) -> None:
    """Ray gives its own start 30 seconds, which a busy machine may not keep."""
    for left in reversed(range(tries)):
        try:
            ray.init(
                num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, log_to_driver=False,
                _node_ip_address="127.0.0.1",
            )  # fmt: skip
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The application of the configuration file, on another port."""
    (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
    module, _, function = application["import_path"].partition(":")
    args = application["args"] | {"cache_tokens": 16_384, "cpus": 0.5}
    port = free_port()
    start_ray()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        build = getattr(import_module(module), function)
        serve.run(build(args), name=application["name"], route_prefix=application["route_prefix"])
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 200)
        yield Served(url, "mini", Tokenizer.load(resolve("mini")))
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_until(true: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


class TestReplicas(OpenAISuite):
    """The whole client test on two replicas."""


def home(messages: list[dict[str, str]]) -> dict[str, Any]:
    """The replica that a conversation is kept on."""
    handle = serve.get_deployment_handle("EngineReplica", "persimmon")
    conversation = ChatRequest.model_validate({"messages": messages}).conversation
    return dict(handle.options(session_id=conversation).describe.remote().result(timeout_s=60))


def ask(served: Served, messages: list[dict[str, str]], **fields: Any) -> Any:
    body = {"messages": messages, "max_tokens": 8, "seed": 1, **fields}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120)


def test_both_replicas_get_conversations_and_each_keeps_its_own(served: Served) -> None:
    homes = set()
    shares = page(
        load("mini", threads=1).decoder, 64, 16, max_sequences=1
    ).shares_blocks  # without, the home is all that can be checked
    for number in range(12):
        turns = [{"role": "user", "content": f"tell me about the number {number}"}]
        homes.add(home(turns)["replica"])
        first = ask(served, turns).json()
        turns += [first["choices"][0]["message"] | {"role": "assistant"}, {"role": "user", "content": "and more"}]
        turns[1].pop("refusal", None)
        assert home(turns) == home(turns[:1])
        usage = ask(served, turns).json()["usage"]
        if shares:
            assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    assert len(homes) == 2


def test_a_client_that_goes_away_frees_the_replica(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "count"}], "stream": True, "max_tokens": 4_000}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body | ENDLESS, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
    wait_until(lambda: metric(served, "persimmon_num_requests_waiting") == 0)
    for number in range(12):  # every replica is heard of again, and holds nothing
        ask(served, [{"role": "user", "content": f"tell me about the number {number}"}], max_tokens=1)
    wait_until(lambda: metric(served, "persimmon_num_requests_running") == 0)
    assert metric(served, "persimmon_kv_cache_usage_perc") == 0


ENDLESS = {"logit_bias": {"297": 100}}
"""mini says " with" for ever: neither its end token nor the chat format's stop string can end an answer early."""


def metric(served: Served, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def test_a_killed_replica_loses_only_its_own_requests_and_is_replaced(served: Served) -> None:
    conversations = [[{"role": "user", "content": f"tell me about the number {number}"}] for number in range(8)]
    homes = [home(messages) for messages in conversations]
    victim = homes[0]
    found: dict[int, list[str]] = {}
    begun: set[int] = set()

    def stream(number: int) -> None:
        # Those of the victim must still run when it dies, the others need not.
        tokens = 12_000 if homes[number] == victim else 2_000
        body = {"messages": conversations[number], "stream": True, "max_tokens": tokens, "seed": 1} | ENDLESS
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=200) as answer:
            found[number] = []
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    found[number].append(line[6:])
                    begun.add(number)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(begun) == 8)
    os.kill(victim["process"], signal.SIGKILL)
    for thread in threads:
        thread.join(200)
    for number, events in sorted(found.items()):
        if homes[number] == victim:
            error = json.loads(events[-1])["error"]
            assert (error["message"], error["code"]) == (LOST, "engine_failure")
        else:
            assert events[-1] == "[DONE]", number
    assert 0 < sum(home_of == victim for home_of in homes) < 8

    def replaced() -> bool:
        now = {home(messages)["replica"] for messages in conversations + [[{"role": "user", "content": "x"}]] * 4}
        return victim["replica"] not in now and len(now) == 2

    wait_until(replaced)
    assert not psutil.pid_exists(victim["process"])
    assert all(ask(served, messages).status_code == 200 for messages in conversations)
    assert metric(served, "persimmon_engine_restarts_total") >= 1


def test_a_replica_that_dies_idle_is_no_longer_counted(served: Served) -> None:
    """No request meets its death: the front has to look."""
    conversations = [[{"role": "user", "content": f"tell me about the number {number}"}] for number in range(12)]
    homes = [home(messages) for messages in conversations]
    assert len({found["replica"] for found in homes}) == 2
    assert all(ask(served, messages).status_code == 200 for messages in conversations)
    before, replaced = (metric(served, name) for name in TOTALS)
    os.kill(homes[0]["process"], signal.SIGKILL)
    wait_until(lambda: metric(served, TOTALS[1]) == replaced + 1)
    assert 0 < metric(served, TOTALS[0]) < before, "what the other one computed"


TOTALS = ("persimmon_computed_tokens_total", "persimmon_engine_restarts_total")


def test_states_are_added_up() -> None:
    assert combined([]) == EngineState()
    found = combined([EngineState(1, 2, 10, 3, active_fraction=(0.1, 0.3)), EngineState(running=4, blocks=10)])
    assert (found.running, found.waiting, found.blocks, found.blocks_held) == (5, 2, 20, 3)
    assert found.active_fraction == (0.1, 0.3)


@pytest.mark.parametrize(
    ("key", "given", "accepted"),
    [
        ("test-key-0123456789", {}, {"serve.example": True, "10.0.0.5": True}),
        ("", {"allow_public_without_key": True}, {"serve.example": False, "10.0.0.5": True}),
        ("", {}, {"serve.example": False, "10.0.0.5": False, "localhost": True}),
        ("", {"allowed_hosts": ["serve.example"]}, {"serve.example": True}),
    ],
)
def test_names_are_judged_by_key_and_settings(
    monkeypatch: pytest.MonkeyPatch, key: str, given: dict[str, Any], accepted: dict[str, bool]
) -> None:
    monkeypatch.setenv("PERSIMMON_API_KEY", key)
    settings = server_settings(ReplicaSettings(**given))
    assert {name: settings.accepts_host(name) for name in accepted} == accepted


def test_what_goes_wrong_in_a_replica_is_named() -> None:
    try:
        raise KeyError("weights")
    except KeyError as error:
        wrapped = ray.exceptions.RayTaskError("generate", "a long\ntraceback", error)
    assert reason_of(wrapped) == "KeyError: 'weights'"
    assert reason_of(RuntimeError("first\nlast")) == "RuntimeError: last"


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="replica_count"):
        ReplicaSettings.model_validate({"replica_count": 2})


@pytest.mark.parametrize(
    ("address", "settings", "served_by_app"),
    [
        ("127.0.0.1", {}, True),
        ("192.0.2.7", {}, False),
        ("192.0.2.7", {"api_keys": ("test-key-0123456789",)}, True),
        ("192.0.2.7", {"allow_public_without_key": True}, True),
    ],
)
def test_a_public_address_needs_a_key(address: str, settings: dict[str, Any], served_by_app: bool) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "server": (address, 8000), "headers": []}
    asyncio.run(PublicNeedsKey(app, ServerSettings(**settings))(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == (200 if served_by_app else 403)
