"""Dense or sparse MLP: decided by a table that was measured on such a GPU, never by hope. No torch.

Published sparse kernels are often slower than dense ones on a GPU, so sparse has to win by measurement or stays off. A
table is written by `persimmon bench kernels --device cuda` and read from a file that names the GPU. Without a file the
tables of MEASURED serve their GPUs; on any other everything is dense. A table is about layers of the size and the
share of active neurons that it was measured at: a model that is far from both deserves one of its own.

    {"version": 1, "gpu": NAME, "active": 0.1, "mlp": {"bfloat16": {"1": {"dense_us": 40.1, "sparse_us": 29.3}, ...}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from persimmon.atomic import write_text
from persimmon.errors import InputError

TABLE_VERSION = 1

_GAIN = 0.97
"""Sparse must take at most this share of the dense time: less is noise of the measurement."""


@dataclass(frozen=True)
class MlpTimes:
    """Microseconds of one layer's MLP."""

    dense_us: float
    sparse_us: float


@dataclass(frozen=True)
class KernelTable:
    """Measured times by format of the weights and number of tokens."""

    gpu: str = ""
    active: float = 0.0
    """Share of active neurons that it was measured at."""
    mlp: Mapping[str, Mapping[int, MlpTimes]] = field(default_factory=dict)

    def sparse(self, weight_format: str, tokens: int) -> bool:
        """Whether the sparse MLP won for so many tokens. Between two measured numbers the larger one decides."""
        measured = self.mlp.get(weight_format, {})
        fitting = [count for count in measured if count >= tokens]
        if not fitting:
            return False
        times = measured[min(fitting)]
        return times.sparse_us <= _GAIN * times.dense_us

    def save(self, path: Path) -> None:
        """Write the file, aside and renamed."""
        mlp = {
            name: {str(count): {"dense_us": t.dense_us, "sparse_us": t.sparse_us} for count, t in rows.items()}
            for name, rows in self.mlp.items()
        }
        document = {"version": TABLE_VERSION, "gpu": self.gpu, "active": self.active, "mlp": mlp}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(document, indent=1) + "\n")


DENSE = KernelTable()
"""No measurements: everything dense."""

SPARSE = KernelTable("any", 0.0, {
    name: {8: MlpTimes(1.0, 0.0)} for name in ("float32", "bfloat16", "fp8", "q8", "p44")
})  # fmt: skip
"""Sparse wherever it can be, for tests and measurements."""


MEASURED = (
    # benchmarks/gpu/results/h200.json, section mlp: the 8B's layers, 10 % of the neurons active.
    KernelTable("NVIDIA H200", 0.1, {
        "bfloat16": {
            1: MlpTimes(67.04, 42.49), 2: MlpTimes(72.08, 51.05), 4: MlpTimes(72.09, 58.42), 8: MlpTimes(71.69, 70.03),
        },
        "q8": {
            1: MlpTimes(53.14, 31.47), 2: MlpTimes(102.16, 69.17), 4: MlpTimes(99.74, 77.67), 8: MlpTimes(95.3, 89.67),
        },
        "p44": {
            1: MlpTimes(55.17, 61.29), 2: MlpTimes(94.9, 62.47), 4: MlpTimes(94.68, 72.89), 8: MlpTimes(93.87, 88.62),
        },
        "fp8": {
            1: MlpTimes(41.83, 27.96), 2: MlpTimes(80.64, 61.28), 4: MlpTimes(79.49, 73.67), 8: MlpTimes(75.6, 91.84),
        },
    }),
)  # fmt: skip
"""What was measured with this version's kernels."""


def default_path() -> Path:
    """Where a table is looked for: $PERSIMMON_KERNEL_TABLE, else the user's cache folder."""
    named = os.environ.get("PERSIMMON_KERNEL_TABLE")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "persimmon" / "gpu_kernels.json"


def load_table(path: Path) -> KernelTable:
    """Read a table. Raises InputError that names the file and the fault."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != TABLE_VERSION:
            raise ValueError(f"version {document['version']!r}, expected {TABLE_VERSION}")
        mlp = {
            str(name): {int(count): MlpTimes(float(t["dense_us"]), float(t["sparse_us"])) for count, t in rows.items()}
            for name, rows in document["mlp"].items()
        }
        return KernelTable(str(document["gpu"]), float(document["active"]), mlp)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"kernel table {path}: {error!r}") from None


def table_for(gpu: str, path: Path | None = None) -> tuple[KernelTable, str]:
    """The table to use on a GPU, and why. A file that was named must exist and be for this GPU."""
    place = path or default_path()
    if not place.is_file():
        if path is not None:
            raise InputError(f"kernel table {path} does not exist")
        for table in MEASURED:
            if table.gpu == gpu:
                return table, f"sparse MLP where it was faster on such a GPU (at {table.active:.0%} active)"
        return (
            DENSE,
            "dense MLP: no kernel table was measured here (`persimmon bench kernels --device cuda` writes one)",
        )
    table = load_table(place)
    if table.gpu != gpu:
        if path is not None:
            raise InputError(f"kernel table {path} was measured on {table.gpu!r}, this is {gpu!r}")
        return DENSE, f"dense MLP: {place} was measured on {table.gpu!r}"
    return table, f"sparse MLP where {place} says it is faster (at {table.active:.0%} active)"
