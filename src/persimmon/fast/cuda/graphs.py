"""Captured steps: a step is recorded once per shape and replayed with one call, so that the CPU launches nothing.

What is recorded must read and write fixed buffers only, and may run a few times before it is recorded (Triton compiles
its kernels then), so it is prepared while the buffers hold a harmless state. How recording works is a function passed
in: `cuda_capture` on a GPU, something that counts in tests, None to run every step as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from persimmon.fast.cuda.plan import DECODE_ROWS

Step = Callable[[], None]
Replay = Callable[[], None]
Capture = Callable[[Step], Replay]

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, DECODE_ROWS)
"""Batch sizes that are captured; a batch is padded to the next one."""

_WARM_UPS = 2
"""Runs before recording: kernels are compiled in the first, libraries choose algorithms in it."""


def bucket_for(rows: int) -> int:
    """The smallest bucket that holds so many rows."""
    return next(size for size in BUCKETS if size >= rows)


class StepGraphs:
    """Replays by key; all graphs of a decoder share one memory pool, as only one runs at a time."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Replay] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._replays

    def prepare(self, key: Hashable, step: Step) -> None:
        """Record a step, unless `key` has one; it may run several times now."""
        if key not in self._replays:
            self._replays[key] = step if self._capture is None else self._capture(step)

    def replay(self, key: Hashable) -> None:
        """Run a prepared step once."""
        self._replays[key]()


def cuda_capture(device: torch.device) -> Capture:
    """Recording into CUDA graphs."""
    memory = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Replay:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                step()
        return graph.replay

    return capture
