"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# Deterministic, and no time limit per example: a busy machine is no failure.
settings.register_profile("persimmon", deadline=None, derandomize=True)
settings.load_profile("persimmon")

# A shell's `&` and nohup make their children ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
