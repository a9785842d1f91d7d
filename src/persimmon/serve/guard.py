"""What every request passes first and last: identity, address, key, size and time limits, and the access log.

Plain ASGI around the application, so that streams pass through untouched. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from persimmon.serve.protocol import error_body
from persimmon.serve.settings import ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/livez"})
"""Routes that need no key."""

CLIENT_GONE = "the client closed the connection"

DISCARDED_BODIES = 4
DISCARD_SECONDS = 5.0
"""What is still read of a body that is too large, in largest bodies, and for how long."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

# The page loads nothing from elsewhere, runs only its own scripts, and turns text into markup through one sanitizer.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
        "manifest-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types dompurify",
    ]
)  # fmt: skip

_SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class SlowClient(OSError):
    """A client did not take what it was sent."""


class SlowBody(Exception):
    """A body did not arrive in time."""


class TooLarge(Exception):
    """A body is over the limit."""


class ClientGone(Exception):
    """The client closed the connection before its body had arrived."""


def write_log(entry: Mapping[str, Any]) -> None:
    """One JSON line on stderr."""
    sys.stderr.write(json.dumps(entry, ensure_ascii=True) + "\n")
    sys.stderr.flush()


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self, app: App, settings: ServerSettings, *, log: Callable[[Mapping[str, Any]], None] = write_log
    ) -> None:
        self._app, self._settings, self._log = app, settings, log
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, self._settings, receive, send)
        scope.setdefault("state", {})["log"] = exchange.facts
        refusal = self._refusal(exchange)
        try:
            if refusal is not None:
                await exchange.refuse(*refusal)
            else:
                await exchange.read_body()
                await self._app(scope, exchange.receive, exchange.send)
        except TooLarge:
            limit = self._settings.max_body_bytes
            await exchange.discard_body()
            await exchange.refuse(413, f"the body is larger than {limit} bytes", "invalid_request_error")
        except SlowBody:
            seconds = self._settings.body_seconds
            await exchange.refuse(408, f"the body did not arrive within {seconds:g} seconds", "invalid_request_error")
        except ClientGone:
            exchange.facts["ended"] = CLIENT_GONE
        except SlowClient as error:
            exchange.facts["ended"] = str(error)
            await exchange.abort()
        finally:
            self._log(exchange.entry())

    def _refusal(self, exchange: _Exchange) -> tuple[int, str, str] | None:
        """(status, message, type) of a request that goes no further."""
        headers = exchange.headers
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if headers.get("host", "").endswith("]"):
            host = headers["host"]
        if not self._settings.accepts_host(host.lower()):
            message = (
                f"the Host header {host!r} is not served here (--allowed-host, or allowed_hosts in a file, adds it)"
            )
            return 403, message, "permission_error"
        origin = headers.get("origin")
        if origin is not None and _authority(origin) != headers.get("host", "").lower():
            return 403, "requests from pages of other origins are not served", "permission_error"
        if exchange.path not in OPEN_PATHS and not self._authorized(headers):
            return 401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error"
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, "content-length is not a number", "invalid_request_error"
        if int(length) > self._settings.max_body_bytes:
            limit = self._settings.max_body_bytes
            return 413, f"the body is larger than {limit} bytes", "invalid_request_error"
        return None

    def _authorized(self, headers: Mapping[str, str]) -> bool:
        """Some key matches; every key is compared, each in constant time."""
        if not self._keys:
            return True
        given = _given_key(headers).encode()
        return bool(sum(hmac.compare_digest(given, key) for key in self._keys))


def _authority(origin: str) -> str:
    """Host and port of an Origin header; empty when it has none, or makes no sense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _given_key(headers: Mapping[str, str]) -> str:
    """The key of a Bearer or X-Api-Key header, or the password of Basic, which browsers ask their user for."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except ValueError:
            return ""
    return headers.get("x-api-key", "")


class _Exchange:
    """One request and its answer: limits on both, and what the log says."""

    def __init__(self, scope: Scope, settings: ServerSettings, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.facts: dict[str, Any] = {}
        self._scope, self._settings = scope, settings
        self._receive, self._send = receive, send
        self._started = time.monotonic()
        self._body: bytes | None = None
        self._body_done = False
        self._status = 0

    async def read_body(self) -> None:
        """Read the whole body within the limits: the application would take what is raised in it for bad JSON."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while more:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    self._body_done = not more
                    if len(body) > self._settings.max_body_bytes:
                        raise TooLarge
        except TimeoutError:
            raise SlowBody from None
        self._body = bytes(body)

    async def discard_body(self) -> None:
        """Take what still comes for a moment: a client that is cut off while it sends never reads the answer."""
        left = DISCARDED_BODIES * self._settings.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while left > 0 and not self._body_done:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._body_done = not message.get("more_body", False)

    async def receive(self) -> Message:
        """The body as one part, then what comes after it."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def abort(self) -> None:
        """Drop the connection with what waits to be sent: nobody reads it."""
        abort = self._scope.get("state", {}).get("abort")
        if abort is not None:
            abort()
            await asyncio.sleep(0)  # the loop tells the server before this request ends without an answer

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer; the client has limited time to take it."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [
                *message.get("headers", []), *_SECURITY_HEADERS, (b"x-request-id", self.request_id.encode())
            ]  # fmt: skip
        try:
            async with asyncio.timeout(self._settings.send_seconds):  # wait_for would start a task for every token
                await self._send(message)
        except TimeoutError:
            raise SlowClient("the client stopped reading") from None

    async def refuse(self, status: int, message: str, kind: str) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._status:
            return
        body = json.dumps(error_body(message, kind)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            browser = "text/html" in self.headers.get("accept", "")
            headers.append((b"www-authenticate", b'Basic realm="persimmon"' if browser else b"Bearer"))
        if not self._body_done:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def entry(self) -> dict[str, Any]:
        """The line of the access log."""
        client = self._scope.get("client")
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.request_id,
            "client": client[0] if client else None,
            "method": self._scope["method"],
            "path": self.path,
            "status": self._status,
            "seconds": round(time.monotonic() - self._started, 4),
            **self.facts,
        }
