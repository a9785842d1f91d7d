"""Keeps the memory that a training step frees for the next step.

By default glibc gives large blocks back to the system at once; the next step's tensors then are new pages again, which
the system has to clear: a fifth of a step of a small model on two cores (docs/LOG.md, 2026-11-26).
"""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, until it ends; False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never, most = -1, 64 << 20
    return all(mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, never), (_TOP_PAD, most)))
