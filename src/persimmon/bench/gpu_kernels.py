"""The MLP of the CUDA engine, dense and sparse: the table by which the engine chooses (fast/cuda/choice.py), and a row.

All layers run in turn as one CUDA graph, so no cache holds them and launches cost the same for both. Weights are random
with a chosen share of active neurons; a trained model's tokens share more of them, so its batches skip more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from persimmon.bench.row import Row, finished, kernels_fields
from persimmon.bench.timing import percent_of
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cuda.choice import DENSE, SPARSE, KernelTable, MlpTimes
from persimmon.fast.cuda.graphs import cuda_capture
from persimmon.fast.cuda.kernels.sparse_mlp import MOST_ACTIVE_TOKENS
from persimmon.fast.cuda.network import Network
from persimmon.fast.cuda.synthesize import FORMATS, synthesize
from persimmon.fast.cuda.weights import Weights

LAYER_BYTES = 1 << 30
"""Least bytes of the MLPs of all layers together: many times the cache of any GPU (50 MB on an H100)."""

MedianSeconds = Callable[[Callable[[], None]], float]
"""The median time of a call."""

Times = dict[str, float]
"""dense_us, sparse_us of one layer, and active_union, the share of neurons that any of the tokens uses."""


@dataclass(frozen=True)
class Setting:
    """What is measured on what."""

    config: ModelConfig
    """Its number of layers and vocabulary are not used."""
    device: torch.device
    formats: Sequence[str]
    tokens: Sequence[int]
    active: float
    runs: int
    layer_bytes: int = LAYER_BYTES


def gpu_kernels_row(setting: Setting) -> tuple[Row, KernelTable]:
    """Measure every format and number of tokens; the row, and the table for the engine.

    Raises InputError for formats that have no sparse MLP, and for more tokens than it takes.
    """
    _check(setting)
    bandwidth = copy_bandwidth(setting)
    entries: list[dict[str, Any]] = []
    measured: dict[str, dict[str, Times]] = {}
    for name in setting.formats:
        weights = _weights(setting, name)
        measured[name] = measure_mlp(weights, setting.tokens, lambda run: median_seconds(run, setting))
        size = weights.layers[0].up.num_bytes + weights.layers[0].down.num_bytes
        entries += _entries(name, measured[name], size, bandwidth)
    table = kernel_table(measured, device_name(setting.device), setting.active)
    return finished(_row(setting, entries, bandwidth, table)), table


def measure_mlp(weights: Weights, tokens: Sequence[int], median: MedianSeconds) -> dict[str, Times]:
    """The times by number of tokens."""
    rows: dict[str, Times] = {}
    layer, config = weights.layers[0], weights.config
    # The first few of the same inputs each time: more tokens never have fewer active neurons by chance.
    generator = torch.Generator(device=weights.device).manual_seed(0)
    inputs = torch.randn(max(tokens), config.hidden_size, generator=generator, device=weights.device).to(weights.dtype)
    for count in tokens:
        x = inputs[:count].contiguous()
        times: Times = {}
        for kind, table in (("dense_us", DENSE), ("sparse_us", SPARSE)):
            run = captured(all_mlps(Network(weights, table), x), weights.device)
            times[kind] = round(median(run) / config.num_layers * 1e6, 2)
        used = Network(weights, DENSE).hidden(x, layer).any(0)
        rows[str(count)] = {**times, "active_union": round(int(used.sum()) / layer.up.outputs, 4)}
    return rows


def all_mlps(network: Network, x: torch.Tensor) -> Callable[[], None]:
    """Every layer's MLP on the same tokens."""

    def run() -> None:
        for index, layer in enumerate(network.weights.layers):
            network._mlp(x, layer, index)

    return run


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As a CUDA graph on a GPU."""
    return cuda_capture(device)(run) if device.type == "cuda" else run


def kernel_table(measured: dict[str, dict[str, Times]], gpu: str, active: float) -> KernelTable:
    """What was measured, for the engine."""
    mlp = {
        name: {int(count): MlpTimes(t["dense_us"], t["sparse_us"]) for count, t in rows.items()}
        for name, rows in measured.items()
    }
    return KernelTable(gpu, active, mlp)


def device_name(device: torch.device) -> str:
    """As the engine compares it; `none` in the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Wall time, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median_seconds(run: Callable[[], None], setting: Setting) -> float:
    """The median of `runs`; one more, which compiles, comes before them."""
    run()
    return statistics.median(seconds_of(run, setting.device) for _ in range(setting.runs))


def copy_bandwidth(setting: Setting) -> float:
    """GB/s of copying, bytes read plus written."""
    source = torch.ones(setting.layer_bytes // 4 + 1, device=setting.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / median_seconds(copy, setting) / 1e9


def _check(setting: Setting) -> None:
    for name in setting.formats:
        if name not in FORMATS or name == "q4":
            known = ", ".join(known for known in FORMATS if known != "q4")
            raise InputError(f"formats with a sparse MLP on a GPU are {known}; got {name!r}")
    if max(setting.tokens) > MOST_ACTIVE_TOKENS:
        raise InputError(f"the sparse MLP takes up to {MOST_ACTIVE_TOKENS} tokens, got {max(setting.tokens)}")
    if not 0 < setting.active < 1:
        raise InputError(f"the share of active neurons must be between 0 and 1, got {setting.active}")


def _weights(setting: Setting, name: str) -> Weights:
    """So many layers that no cache holds their MLPs; the vocabulary plays no part and is small."""
    one = setting.config.replace(num_layers=1, vocab_size=64, bos_token_id=0, eos_token_id=0)
    layer = synthesize(one, name, setting.device, setting.active).layers[0]
    count = max(1, -(-setting.layer_bytes // (layer.up.num_bytes + layer.down.num_bytes)))
    return synthesize(one.replace(num_layers=count), name, setting.device, setting.active)


def _entries(name: str, measured: dict[str, Times], size: int, bandwidth: float) -> list[dict[str, Any]]:
    """A line per number of tokens and kind; sparse ones count the bytes of dense ones: what they were spared."""
    found = []
    for count, times in measured.items():
        for kind in ("dense", "sparse"):
            microseconds = times[f"{kind}_us"]
            rate = size / microseconds / 1e3 if microseconds > 0 else 0.0
            found.append({
                "kernel": f"MLP, {name}, {kind}, {count} tokens", "microseconds": microseconds, "num_bytes": size,
                "gb_s": rate, "percent_of_bandwidth": percent_of(rate, bandwidth),
                "active_share": times["active_union"],
            })  # fmt: skip
    return found


def _row(setting: Setting, entries: list[dict[str, Any]], bandwidth: float, table: KernelTable) -> Row:
    return {
        **kernels_fields(setting.config, setting.formats, entries, bandwidth),
        "engine": "cuda",
        "threads": 1,
        "context": 1,
        "gpu": table.gpu,
        "chosen": {
            name: {str(count): "sparse" if table.sparse(name, count) else "dense" for count in setting.tokens}
            for name in setting.formats
        },
    }
