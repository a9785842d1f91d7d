"""Import this before anything that imports triton: kernels then run on the CPU, one program after the other.

The variable must stand when triton is first imported. On a machine with a GPU, run these tests in a process of their
own without it (PERSIMMON_TEST_ON_GPU=1) to compile and run the kernels there.
"""

from __future__ import annotations

import os
import sys

import pytest

if not os.environ.get("PERSIMMON_TEST_ON_GPU"):
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET"), "triton was imported too early"
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")

DEVICE = "cuda" if os.environ.get("PERSIMMON_TEST_ON_GPU") else "cpu"


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
