"""What a server is and what it allows, in one place."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from persimmon.errors import InputError

MIN_KEY_LENGTH = 8


@dataclass(frozen=True)
class ServerSettings:
    """Checked once: a public address without a key is refused."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route but /health; without keys everything is open."""
    allow_public_without_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are accepted besides the own address; protects from DNS rebinding."""
    max_concurrency: int = 16
    """Requests that run together."""
    max_queue: int = 64
    """Requests that may wait; one more gets 429."""
    max_body_bytes: int = 4 << 20
    header_seconds: float = 10.0
    """Most time for the header of a request to arrive; then the connection is closed."""
    max_connections: int | None = None
    """Connections at a time; None is what the limit of open files allows."""
    body_seconds: float = 30.0
    """Most time for the body of a request to arrive."""
    request_seconds: float = 3_600.0
    """Most time for an answer."""
    send_seconds: float = 60.0
    """Most time for a client to take what it was sent; a slower one is taken for gone."""
    drain_seconds: float = 30.0
    """Time for running answers after the first SIGTERM."""
    ping_seconds: float = 15.0
    """A stream that is silent for so long gets a comment line, so that nothing between takes it for dead."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port must be from 0 to 65535, got {self.port}")
        for name in ("max_concurrency", "max_body_bytes", "max_connections"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.max_queue < 0:
            raise InputError(f"max_queue must be 0 or more, got {self.max_queue}")
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"an API key needs at least {MIN_KEY_LENGTH} printable ASCII characters and no space")
        if not self.api_keys and not is_loopback(self.host) and not self.allow_public_without_key:
            raise InputError(
                f"host {self.host} can be reached from outside: give --api-key (or PERSIMMON_API_KEY), "
                "or say --allow-public-without-key"
            )

    def accepts_host(self, name: str) -> bool:
        """Whether a Host header, without its port and in small letters, names this server.

        A page elsewhere can have its own name resolve to this machine and so become the same origin (DNS rebinding).
        With keys that gains it nothing; without, names must be known, while an address is no name.
        """
        if name in self._own_names:
            return True
        if is_loopback(self.host) or self.allowed_hosts:
            return False
        return bool(self.api_keys) or is_address(name.removeprefix("[").removesuffix("]"))

    @cached_property
    def _own_names(self) -> frozenset[str]:
        own = {"localhost", "127.0.0.1", "[::1]", f"[{self.host}]" if ":" in self.host else self.host.lower()}
        if not is_loopback(self.host):
            machine = socket.gethostname().lower()
            own |= {machine, f"{machine.partition('.')[0]}.local"}
        return frozenset(own | {name.lower() for name in self.allowed_hosts})


def is_address(name: str) -> bool:
    """An IP address, not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(lines: Sequence[str]) -> tuple[str, ...]:
    """Keys of a key file: one per line; empty lines and lines beginning with # are skipped."""
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
