"""The official client against the server on one machine; serve/test_server.py has what is particular."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai", "httpx"):
    pytest.importorskip(package)

from openai_suite import OpenAISuite, Served  # noqa: E402
from served import running  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running() as server:
        yield Served(server.url, "tiny", tiny_tokenizer())


class TestLocalServer(OpenAISuite):
    """All of it."""
