"""schemathesis over the description of the interface: nothing it sends makes the server fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx"):
    pytest.importorskip(package)
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from served import Server, running  # noqa: E402

EXAMPLES = int(os.environ.get("PERSIMMON_FUZZ_EXAMPLES", "12"))
"""Per operation; 600 make more than 5,000 in all."""

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def schema(server: Server) -> object:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_the_server_fail(case: object, server: Server) -> None:
    body = getattr(case, "body", None)
    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
        body["max_tokens"] = min(body["max_tokens"], 4)  # short answers: more requests
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)  # type: ignore[attr-defined]


def test_nothing_is_left_behind(server: Server) -> None:
    server.wait_idle()
