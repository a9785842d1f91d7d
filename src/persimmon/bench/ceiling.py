"""A limit that is printed before a benchmark and measured again after it. No torch."""

from __future__ import annotations

from persimmon.bench.limits import Limit, measure, merge


class Ceiling:
    """Read bandwidth (GB/s) or the rate of matrix products (GFLOP/s) of the same minutes as the runs."""

    def __init__(self, kind: str, threads: int, num_bytes: int | None = None, device: str = "cpu") -> None:
        """kind: `read` or `gemm`. Measures."""
        self._kind, self._threads, self._num_bytes, self._device = kind, threads, num_bytes, device
        self.before = self._measure()

    def again(self) -> Limit:
        """Measure once more; both measurements as one."""
        return merge(self.before, self._measure())

    def describe(self) -> str:
        """The line that a benchmark prints first."""
        unit = "GB/s read" if self._kind == "read" else "GFLOP/s in matrix products"
        others = "".join(f", {name} {value:.1f}" for name, value in self.before.others.items())
        return f"ceiling: {self.before.value:.1f} {unit} by {self._threads} threads ({self.before.method}{others})"

    def _measure(self) -> Limit:
        return measure(self._kind, self._threads, self._num_bytes, self._device)
