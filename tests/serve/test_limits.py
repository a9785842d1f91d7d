"""What a client may take before its request is complete: time, bytes, connections."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

from served import running  # noqa: E402


def test_bodies_that_are_too_large_or_too_slow() -> None:
    """Through the whole application, which takes an error while it reads for a body that it cannot parse."""
    kind = {"content-type": "application/json"}
    with running(max_body_bytes=1 << 20, body_seconds=1.0) as small:
        chunked = (b" " * 65_536 for _ in range(40))
        large = small.http.post("/v1/chat/completions", content=chunked, headers=kind)
        assert large.status_code == 413 and "larger than 1048576 bytes" in large.json()["error"]["message"]
        with socket.create_connection(("127.0.0.1", small.service.settings.port)) as slow:
            head = (
                "POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
            )
            slow.sendall(f"{head}\r\n{{".encode())
            slow.settimeout(10)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_requests_that_never_become_whole_do_not_fill_the_house() -> None:
    with running(header_seconds=1.5, max_connections=20) as small:
        small.http.close()  # its idle connection would count
        port = small.service.settings.port
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        for one in half:
            one.sendall(b"GET /health HT")
        assert httpx.get(f"{small.url}/health", timeout=5).status_code == 200
        for one in half:  # closed at once, to make room, or after a while
            one.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(100) == b""
            one.close()
        kept = httpx.Client(base_url=small.url)
        for _ in range(3):  # a connection that is used is none of them
            assert kept.get("/health").status_code == 200
            time.sleep(1)
        kept.close()
