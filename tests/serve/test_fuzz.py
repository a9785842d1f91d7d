"""schemathesis over the description of the interface: nothing it sends makes the server fail.

Sixty requests as a test. The full proof (docs/serving.md):

    PERSIMMON_FUZZ_EXAMPLES=5000 python -m pytest -s --timeout 7200 tests/serve/test_fuzz.py
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx"):
    pytest.importorskip(package)
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings, strategies  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from served import Server, running  # noqa: E402

EXAMPLES = int(os.environ.get("PERSIMMON_FUZZ_EXAMPLES", "60"))
"""Requests in all, at least."""

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.mark.slow
def test_no_request_makes_the_server_fail(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    statuses: Counter[int] = Counter()
    # Those without a body have little to vary and end early; those with one share what is left.
    for operation in sorted(operations, key=lambda operation: operation.method == "post"):
        left = EXAMPLES - statuses.total()
        share = (
            EXAMPLES // len(operations) if operation.method != "post" else left // _posts_from(operation, operations)
        )
        _fuzz(operation, server, max(share, 1), statuses)
    print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}")
    assert statuses.total() >= EXAMPLES


def _posts_from(operation: Any, operations: list[Any]) -> int:
    """How many operations with a body are still to come, with this one."""
    posts = [other for other in operations if other.method == "post"]
    return len(posts) - posts.index(operation)


def _fuzz(operation: Any, server: Server, count: int, statuses: Counter[int]) -> None:
    """So many requests to one operation, valid and not."""

    @settings(
        max_examples=count, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(case=strategies.one_of(operation.as_strategy(mode) for mode in MODES))
    def attempt(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 4)  # short answers: more requests
        response = case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)
        statuses[response.status_code] += 1

    attempt()


def test_nothing_is_left_behind(server: Server) -> None:
    server.wait_idle()
