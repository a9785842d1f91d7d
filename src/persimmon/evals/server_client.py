"""Requests to an OpenAI-compatible server, with patience for one that is busy or starting."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any

from persimmon.errors import ContextLengthError, InputError, UnavailableError

PATIENCE_SECONDS = 180.0
"""How long a server may answer that it is busy, or not at all; a model of some GB is loaded by then."""

FIRST_PATIENCE_SECONDS = 10.0
"""The same for the first question: where nobody answers it, the address is likely wrong."""

LONGEST_PAUSE = 30.0
"""Seconds between two tries, whatever the server asks for."""

_RETRIED = {408, 429, 500, 502, 503, 504}
_TOO_LONG = ("context_length_exceeded", "context length", "maximum context")
"""What servers say of a prompt that does not fit (this one and OpenAI's, SGLang's, vLLM's)."""


class ServerClient:
    """Sends to `url` (ending in /v1)."""

    def __init__(self, url: str, api_key: str | None, timeout_seconds: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the URL must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout_seconds

    def get(self, path: str, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """The answer to a GET."""
        return self._send(urllib.request.Request(f"{self.url}{path}", headers=self._headers), patience)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST. ContextLengthError when the prompt does not fit, InputError for other refusals."""
        data = json.dumps(body).encode()
        return self._send(urllib.request.Request(f"{self.url}{path}", data, self._headers))

    def _send(self, request: urllib.request.Request, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
        until = time.monotonic() + patience
        attempt = 0
        while True:
            wanted: float | None = None
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    content: dict[str, Any] = json.load(answer)
                    return content
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read(2_000).decode(errors='replace')}"
                if error.code not in _RETRIED:
                    kind = ContextLengthError if _is_too_long(error.code, problem) else InputError
                    raise kind(f"{request.full_url} refused the request: {problem[:500]}") from None
                wanted = _retry_after(error.headers)
            except (OSError, json.JSONDecodeError) as error:  # URLError and TimeoutError are OSErrors
                problem = str(error)
            pause = min(wanted if wanted is not None else 0.2 * 2**attempt, LONGEST_PAUSE)
            if time.monotonic() + pause > until:
                raise UnavailableError(f"{request.full_url} did not answer: {problem}")
            time.sleep(pause)
            attempt += 1


def _is_too_long(status: int, problem: str) -> bool:
    return status == 400 and any(words in problem.lower() for words in _TOO_LONG)


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks for; a date is as good as nothing said."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("Retry-After", "")))
    return None
