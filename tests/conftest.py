"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# Deterministic, and no time limit per example: a busy machine is no failure.
settings.register_profile("persimmon", deadline=None, derandomize=True)
settings.load_profile("persimmon")
