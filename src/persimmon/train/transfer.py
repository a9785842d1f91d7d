"""Batches on their way: prepared ahead of their step, to be copied to a GPU without anybody waiting (`model.staged`).

A GPU works off a queue that the program fills. Reading one number from it, or copying to it from ordinary memory, waits
until the queue is empty, after which the GPU idles until new work arrives. So a training step waits for it once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """What `make` returns for one step after the other, made in a thread while the step before it runs."""

    def __init__(self, make: Callable[[int], T], num_steps: int) -> None:
        self._make, self._num_steps = make, num_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The one of `step`, and begin with the next. Errors of `make` are raised here."""
        coming = self._coming
        future = coming[1] if coming is not None and coming[0] == step else self._thread.submit(self._make, step)
        result = future.result()
        if step + 1 < self._num_steps:
            self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return result
