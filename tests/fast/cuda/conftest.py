"""Kernels run in Triton's interpreter here; see triton_interpreter.py."""

from __future__ import annotations

import triton_interpreter  # noqa: F401 - before any kernel is imported
