"""The JSON row that every benchmark ends with: what it holds, where it was measured, how it is kept. No torch."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from persimmon import machine
from persimmon.atomic import write_text
from persimmon.bench.timing import percent_of
from persimmon.config import ModelConfig
from persimmon.errors import InputError

Row = dict[str, Any]

FIELDS: dict[str, tuple[type, ...]] = {
    "bench": (str,),
    "model": (str,),
    "engine": (str,),
    "format": (str,),
    "threads": (int,),
    "context": (int,),
    "tokens_per_second": (float, int),
    "runs": (list,),
    "bytes_per_token": (float, int, type(None)),
    "bytes_per_token_dense": (float, int, type(None)),
    "bandwidth_gb_s": (float, int, type(None)),
    "ceiling_tokens_per_second": (float, int),
    "percent_of_ceiling": (float, int),
    "peak_rss_bytes": (int,),
    "versions": (dict,),
    "machine": (dict,),
}
"""Every row has these. `runs` are the tokens per second of each run, `tokens_per_second` is their median. Bytes and
bandwidth are null where arithmetic is the limit (prefill has both; train and serve have none)."""

_PACKAGES = ("persimmon", "torch", "numpy")
_DIGITS = 6


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InputError that names the field which is missing or of the wrong kind."""
    for name, kinds in FIELDS.items():
        if name not in row:
            raise InputError(f"a benchmark row needs the field {name!r}")
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise InputError(f"{name} of a benchmark row must be {kinds[0].__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} of a benchmark row must be finite, got {value!r}")
    if not row["runs"]:
        raise InputError("runs of a benchmark row must hold one run or more")


def finished(row: Row) -> Row:
    """The row with versions and machine, numbers rounded to six digits, checked."""
    whole = {**row, "versions": {**versions(), **row.get("versions", {})}, "machine": machine_facts()}
    whole.setdefault("peak_rss_bytes", peak_rss_bytes())
    result: Row = _rounded(whole)
    check_row(result)
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def versions() -> dict[str, str]:
    """Of everything whose change could change a figure."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts() -> dict[str, Any]:
    """The machine, and how busy it was: a load above the benchmark's own threads means company."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": machine.cpu_name(),
        "features": machine.cpu_features(),
        "threads": machine.cpu_threads(),
        "memory_bytes": machine.memory_total(),
        "system": platform.platform(terse=True),
        "load_average": load,
    }


def peak_rss_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux, bytes on macOS


def line(row: Row) -> str:
    """The row on one line."""
    return json.dumps(row, ensure_ascii=False)


def write(row: Row, file: Path) -> None:
    """Keep the row as an indented document, written aside and renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(row, ensure_ascii=False, indent=2) + "\n")


def kernels_fields(config: ModelConfig, formats: Sequence[str], entries: list[dict[str, Any]], bandwidth: float) -> Row:
    """What the rows of kernels have in common; tokens per second are layers per second of the first entry."""
    first = entries[0]
    rate, most = 1e6 / first["microseconds"], bandwidth * 1e9 / first["num_bytes"]
    return {
        "bench": "kernels",
        "model": f"layers of {config.hidden_size} x {config.intermediate_size}",
        "format": ", ".join(formats),
        "tokens_per_second": rate,
        "runs": [rate],
        "bytes_per_token": first["num_bytes"],
        "bytes_per_token_dense": first["num_bytes"],
        "bandwidth_gb_s": bandwidth,
        "ceiling_tokens_per_second": most,
        "percent_of_ceiling": percent_of(rate, most),
        "kernels": entries,
    }
