"""What is measured on what, and one row of it: the cases that a section yields."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from persimmon.bench import gpu_kernels
from persimmon.config import ModelConfig
from persimmon.fast.cuda.choice import KernelTable, MlpTimes
from persimmon.fast.cuda.synthesize import synthesize
from persimmon.fast.cuda.weights import Weights


class OutOfTime(Exception):
    """The budget is used up; what was measured so far is kept."""


class Case(NamedTuple):
    """One row of a section."""

    key: dict[str, Any]
    """What it is about: no two rows of a section have the same."""
    measure: Callable[[], dict[str, Any]]
    """The rest of the row. Whatever it holds on the device is free when it returns, but for the bench's weights."""
    seconds: float = 0.0
    """Time that must be left to begin it."""


Section = Callable[["Bench"], Iterator[Case]]


@dataclass
class Bench:
    """The shape, the device, the sizes and the report."""

    config: ModelConfig
    device: torch.device
    formats: list[str]
    active: float
    batches: list[int]
    contexts: list[int]
    prompts: list[int]
    decode_tokens: int
    greedy_tokens: int
    """Ids that must be the reference's, up to the tie rule."""
    repeats: int
    """Runs of which the median counts; one more, which compiles and captures, comes before them."""
    deadline: float
    report: dict[str, Any]
    save: Callable[[], None]
    _weights: dict[str, Weights] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """False in Triton's interpreter."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bfloat16 on a GPU; float32 in the interpreter, whose bfloat16 is not rounded."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def plain(self) -> str:
        """The unquantized format."""
        return "bfloat16" if self.on_gpu else "float32"

    def kv_dtype(self, name: str) -> str:
        """Cache type that a format of weights is measured with."""
        return self.plain if name == self.plain else "int8"

    def check_time(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime when less than that is left of the budget."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTime

    def weights(self, name: str) -> Weights:
        """Synthetic weights; one format at a time is in memory, if no one else holds another."""
        if name not in self._weights:
            self.drop_weights()
            self._weights[name] = synthesize(self.config, name, self.device, self.active)
        return self._weights[name]

    def drop_weights(self) -> None:
        """Free them."""
        self._weights.clear()
        self.release()

    def release(self) -> None:
        """Give back what is not held any more: decoders and their steps are cycles, which only the collector frees."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def median_seconds(self, run: Callable[[], None]) -> float:
        """Median wall time of a run, the device idle before and after."""
        run()
        return statistics.median(gpu_kernels.seconds_of(run, self.device) for _ in range(self.repeats))

    def rows(self, section: str) -> list[dict[str, Any]]:
        """What a section has measured so far, failures left out."""
        rows: list[dict[str, Any]] = self.report["sections"].get(section, {}).get("rows", [])
        return [row for row in rows if "error" not in row]

    def ceiling(self, what: str) -> float:
        """A measured ceiling: "copy" in bytes, "matmul" in operations per second; 0 when it is not known."""
        units = {"copy": ("gb_s", 1e9), "matmul": ("tflop_s", 1e12)}
        name, unit = units[what]
        return next((float(row[name]) * unit for row in self.rows("ceilings") if row["what"] == what), 0.0)

    def kernel_table(self) -> KernelTable:
        """What was measured of the MLP, for the engine."""
        mlp: dict[str, dict[int, MlpTimes]] = {}
        for row in self.rows("mlp"):
            mlp.setdefault(row["format"], {})[row["tokens"]] = MlpTimes(row["dense_us"], row["sparse_us"])
        return KernelTable(self.report["device"]["name"], self.active, mlp)
