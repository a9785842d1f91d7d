"""Settings of all tests."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

import interpreter_environment  # noqa: F401  (first: it must stand before anything imports triton)
from leftovers import describe, end, remaining_children, remaining_threads

# Deterministic, and no time limit per example: a busy machine is no failure.
settings.register_profile("persimmon", deadline=None, derandomize=True)
settings.load_profile("persimmon")

# A shell's `&` and nohup make their children ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def no_process_left() -> Iterator[None]:
    """A process that a test leaves behind would keep pytest from ending: its parent waits for it."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert not left, f"processes left behind: {', '.join(f'{p.name} ({p.pid})' for p in left)}"


LEFT_BEHIND = pytest.StashKey[list[str]]()
"""What the tests' processes left behind, by name."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """One of several processes that run tests (pytest-xdist) has ended; its session's finish wrote what it left."""
    node.config.stash.setdefault(LEFT_BEHIND, []).extend(getattr(node, "workeroutput", {}).get("left behind", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What outlives the tests is a failure of the run, by name; without this, the run might never end."""
    config = session.config
    children, threads = remaining_children(), remaining_threads()
    names = [describe(child) for child in children] + [f"thread {thread.name}" for thread in threads]
    end(children)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left behind"] = names
        return
    names += config.stash.get(LEFT_BEHIND, [])
    if not names:
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line("\nleft behind by the tests: " + "; ".join(names), red=True)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
