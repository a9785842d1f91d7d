"""Import this before anything that imports triton: its kernels then run on the CPU, one program after the other.

The variable must stand when triton is first imported. On a machine with a GPU, PERSIMMON_TEST_ON_GPU=1 leaves it out,
and the same tests compile and run the kernels there.
"""

from __future__ import annotations

import os
import sys

DEVICE = "cuda" if os.environ.get("PERSIMMON_TEST_ON_GPU") else "cpu"

if DEVICE == "cpu":
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET"), "triton was imported too early"
    os.environ["TRITON_INTERPRET"] = "1"
