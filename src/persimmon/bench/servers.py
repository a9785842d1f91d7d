"""Servers under test as processes: started, watched, ended. No torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from persimmon.bench.load import Address
from persimmon.errors import UnavailableError

_START_SECONDS = 300.0
_END_SECONDS = 20.0
_SAMPLE_SECONDS = 1.0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server in a process of its own, ready when the context is entered."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.address = Address("127.0.0.1", port)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    @property
    def pid(self) -> int:
        """Of its main process."""
        return self._process.pid

    def __enter__(self) -> ServerProcess:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._log.seek(0)
                raise UnavailableError(f"the server ended at once: {self._log.read().strip()[-500:]}")
            if is_ready(self.address):
                return self
            time.sleep(0.1)
        self._end()
        raise UnavailableError(f"the server was not ready after {_START_SECONDS:.0f} seconds")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        self._log.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def is_ready(address: Address) -> bool:
    """Whether /ready says 200."""
    try:
        with urllib.request.urlopen(f"http://{address.host}:{address.port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def cache_share_held(address: Address, patience: float = 10.0) -> float | None:
    """Share of the cache's blocks that running requests hold, once it has come to rest; None without such a metric.

    With nobody asking any more, anything but 0 is a leak.
    """
    until = time.monotonic() + patience
    share = _cache_share(address)
    while share and time.monotonic() < until:
        time.sleep(0.1)
        share = _cache_share(address)
    return share


def _cache_share(address: Address) -> float | None:
    try:
        with urllib.request.urlopen(f"http://{address.host}:{address.port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    except (OSError, urllib.error.URLError):
        return None
    return parse_cache_share(page)


def parse_cache_share(page: str) -> float | None:
    """The gauge kv_cache_usage_perc of a Prometheus page."""
    found = re.search(r"^persimmon_kv_cache_usage_perc(?:\{[^}]*\})? (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else None


class RssWatch:
    """Resident memory of a process and its children, sampled every second while the context is open."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples: list[int] = []
        """Bytes."""

    def __enter__(self) -> RssWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append(tree_rss_bytes(self._pid))

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.samples.append(tree_rss_bytes(self._pid))


def tree_rss_bytes(pid: int) -> int:
    """Resident bytes of a process and all below it; 0 where /proc does not tell."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        total += _rss_bytes(one)
        waiting += parents.get(one, [])
    return total


def _rss_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
