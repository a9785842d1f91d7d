"""For tests of kernels: skips, saying why, where triton is not installed; makes its interpreter a little faster."""

from __future__ import annotations

from interpreter_environment import DEVICE  # isort: skip - before triton

import pytest

__all__ = ["DEVICE"]

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")


def _patch_once() -> None:
    """Prepare triton.language once per module and not per call: a quarter of the time of a small kernel."""
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            """Interpreted processes compile nothing, so it may stay."""

    def patch(fn):
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            original(fn)
        return Kept()

    interpreter._patch_lang = patch


if DEVICE == "cpu":
    _patch_once()
