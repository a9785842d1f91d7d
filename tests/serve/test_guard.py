"""Keys, hosts, sizes and times, on an application that only echoes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("pydantic")

from persimmon.errors import InputError
from persimmon.serve.guard import Guard
from persimmon.serve.settings import ServerSettings, is_loopback, read_keys

KEY, OTHER = "test-key-0123456789", "another-key-123"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Reply:
    def __init__(self, messages: list[dict[str, Any]], log: list[Mapping[str, Any]]) -> None:
        self.status = messages[0]["status"] if messages else 0
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]} if messages else {}
        self.body = b"".join(m.get("body", b"") for m in messages[1:])
        self.log = log


def call(
    settings: ServerSettings, path: str = "/v1/models", *, body: tuple[bytes, ...] = (b"",), stall: bool = False,
    send_delay: float = 0, vanish: bool = False, **headers: str,
) -> Reply:  # fmt: skip
    sent: list[dict[str, Any]] = []
    log: list[Mapping[str, Any]] = []
    parts = list(body)

    async def receive() -> dict[str, Any]:
        if stall:
            await asyncio.sleep(30)
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts) or vanish}

    async def send(message: Any) -> None:
        await asyncio.sleep(send_delay)
        sent.append(message)

    named = {"host": "127.0.0.1:8000"} | {k.replace("_", "-"): v for k, v in headers.items()}
    scope = {
        "type": "http", "path": path, "method": "POST", "client": ("127.0.0.1", 5),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()],
    }  # fmt: skip
    asyncio.run(Guard(echo, settings, log=log.append)(scope, receive, send))
    return Reply(sent, log)


LOCKED = ServerSettings(api_keys=(KEY, OTHER))


def test_every_route_but_health_needs_a_key() -> None:
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/ready", "/web/app.js", "/nothing", "/health/x"):
        reply = call(LOCKED, path)
        assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer", path
    assert call(LOCKED, "/health").status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {OTHER}"}, 200),
        ({"x_api_key": OTHER}, 200),
        ({"authorization": "Basic YW55OnRlc3Qta2V5LTAxMjM0NTY3ODk="}, 200),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": "Bearer \u00fc\u00e9"}, 401),
        ({}, 401),
    ],
)
def test_keys(headers: dict[str, str], status: int) -> None:
    assert call(LOCKED, **headers).status == status


def test_browsers_ask_for_the_key() -> None:
    assert call(LOCKED, "/", accept="text/html").headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:99", 200), ("[::1]:8000", 200), ("good.example", 200),
     ("evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("", 403)],
)  # fmt: skip
def test_only_own_names_are_served(host: str, status: int) -> None:
    assert call(ServerSettings(allowed_hosts=("good.example",)), host=host).status == status


def test_other_origins_are_refused() -> None:
    assert call(ServerSettings(), origin="https://evil.example").status == 403
    assert call(ServerSettings(), origin="http://127.0.0.1:8000").status == 200
    for odd in ("null", "http://[", "http://[evil", "http://", ""):
        assert call(ServerSettings(), origin=odd).status == 403, odd


def test_names_on_a_public_address() -> None:
    """Without a key a page elsewhere could take this server's place by a name of its own; an address is no name."""
    free = ServerSettings(host="0.0.0.0", allow_public_without_key=True)
    for host, status in (
        ("192.168.1.5:8000", 200), ("[2001:db8::1]:8000", 200), ("localhost:8000", 200), (socket.gethostname(), 200),
        ("evil.example:8000", 403), ("192.168.1.5.evil.example", 403),
    ):  # fmt: skip
        assert call(free, host=host).status == status, host
    named = ServerSettings(host="0.0.0.0", allow_public_without_key=True, allowed_hosts=("good.example",))
    assert call(named, host="good.example").status == 200 and call(named, host="192.168.1.5").status == 403
    locked = ServerSettings(host="0.0.0.0", api_keys=(KEY,))
    assert call(locked, host="any.example", authorization=f"Bearer {KEY}").status == 200


def test_large_bodies_are_refused_announced_or_not() -> None:
    small = ServerSettings(max_body_bytes=10)
    assert call(small, body=(b"12345", b"67890")).body == b"1234567890"
    assert call(small, body=(b"12345", b"67890", b"1")).status == 413
    assert call(small, content_length="11").status == 413
    assert call(small, content_length="x").status == 400


def test_slow_bodies_and_slow_readers_are_dropped() -> None:
    slow = call(ServerSettings(body_seconds=0.05), stall=True)
    assert slow.status == 408 and slow.headers["connection"] == "close"
    gone = call(ServerSettings(), body=(b"half",), vanish=True)
    assert gone.status == 0 and gone.log[0]["ended"] == "the client closed the connection"
    reader = call(ServerSettings(send_seconds=0.05), send_delay=5)
    assert reader.log[0]["ended"] == "the client stopped reading"


def test_request_ids_are_kept_when_they_are_harmless() -> None:
    assert call(ServerSettings(), x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    for odd in ("a b", "a" * 200, "a\u00e9"):
        assert call(ServerSettings(), x_request_id=odd).headers["x-request-id"] != odd


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "can be reached from outside"),
        ({"host": "::"}, "can be reached from outside"),
        ({"host": "example.org"}, "can be reached from outside"),
        ({"api_keys": ("short",)}, "at least 8"),
        ({"api_keys": ("with a space in it",)}, "at least 8"),
        ({"port": 70_000}, "port"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_concurrency": 0}, "max_concurrency"),
    ],
)
def test_unsafe_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ServerSettings(**settings)


def test_safe_settings_are_not() -> None:
    check: Callable[..., ServerSettings] = ServerSettings
    check(host="0.0.0.0", api_keys=(KEY,))
    check(host="0.0.0.0", allow_public_without_key=True)
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("10.0.0.1")
    assert read_keys(["# comment", "", " first-key ", "second-key"]) == ("first-key", "second-key")
