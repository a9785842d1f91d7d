"""Settings of all tests."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

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
