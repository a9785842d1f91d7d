"""Ray for work that is spread: the cluster that RAY_ADDRESS names, or a small one on this machine. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_OBJECT_STORE_BYTES = 100 << 20
"""Of a Ray started here; what goes through it is text, and Ray's default is a third of the memory."""

_MEMORY_BYTES = 2 << 30
"""Per core, what a Ray started here has to promise: datatrove asks for so much, and waits without a word where the free
memory, Ray's own count, is below it. Nothing is taken by a promise."""


@contextlib.contextmanager
def ray_cluster(ray: Any, cores: float) -> Iterator[None]:
    """Inside, `ray` is connected; one started here has so many cores, is reachable from nowhere else, and ends."""
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level="WARNING")
    else:
        whole = int(-(-cores // 1))
        ray.init(
            num_cpus=whole, object_store_memory=_OBJECT_STORE_BYTES, _memory=whole * _MEMORY_BYTES,
            include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="WARNING",
        )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
