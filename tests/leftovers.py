"""What a run of the tests must not leave behind: child processes and threads that keep the interpreter from ending."""

from __future__ import annotations

import threading
from concurrent.futures import thread as pools

import psutil

EXPECTED = (
    "multiprocessing.resource_tracker", "multiprocess.resource_tracker", "multiprocess.forkserver",
    "torch._inductor.compile_worker",
)  # fmt: skip
"""Helpers of libraries that end with this process."""

_GRACE_SECONDS = 10.0
"""For children that are ending anyway."""


def remaining_children() -> list[psutil.Process]:
    """Children, and theirs, that are still there after a while; oldest first."""
    found = [child for child in psutil.Process().children(recursive=True) if not _is_expected(child)]
    _, alive = psutil.wait_procs(found, timeout=_GRACE_SECONDS)
    return sorted((child for child in alive if _is_running(child)), key=lambda child: child.pid)


def remaining_threads() -> list[threading.Thread]:
    """Threads that the interpreter would wait for at its end."""
    others = set(threading.enumerate()) - {threading.main_thread()} - set(pools._threads_queues)  # a pool ends its own
    return [thread for thread in others if not thread.daemon]


def describe(child: psutil.Process) -> str:
    """Number and command line."""
    try:
        return f"process {child.pid}: {' '.join(child.cmdline())[:200]}"
    except psutil.Error:
        return f"process {child.pid}"


def end(children: list[psutil.Process]) -> None:
    """Kill them, so that whoever waits for this process, or for its output, does not wait for ever."""
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue


def _is_running(child: psutil.Process) -> bool:
    try:
        return bool(child.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_expected(child: psutil.Process) -> bool:
    try:
        command = " ".join(child.cmdline())
    except psutil.Error:
        return True  # gone
    return any(name in command for name in EXPECTED)
