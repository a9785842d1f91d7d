"""A CpuDecoder from a model directory, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persimmon.checkpoints.adapters import open_adapter
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.config import ModelConfig
from persimmon.errors import InputError, UnavailableError
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.memory import MemoryPlan, check_memory, plan_memory
from persimmon.fast.cpu.packed import PackedDirectory, is_packed, open_packed
from persimmon.fast.cpu.resident import WEIGHTS, choose_weights, copy_resident, load_resident
from persimmon.fast.cpu.weights import Arrays, float_arrays, float_format
from persimmon.machine import cpu_threads

_LEAST_CONTEXT = 512  # tokens that must fit for loading to make sense


def load_decoder(
    directory: Path,
    config: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    adapter: Path | None = None,
    verify: bool = True,
    weights: str = "auto",
    progress: ProgressReport = no_progress,
    **options: Any,
) -> CpuDecoder:
    """Load a model directory for the CPU engine.

    config: replaces the directory's own, for another rotary precision. dtype: bfloat16 rounds float32 weights to it.
    adapter: directory of a LoRA adapter, merged into the weights in memory.
    verify: compare the fingerprints of packed files.
    weights: mapped (shared with other processes, given back when memory is short), resident (copied into large pages:
        faster), or auto: resident where Linux has large pages and the memory is free.
    options: those of CpuDecoder.
    Raises CheckpointError for damaged files, UnavailableError when the memory cannot hold the model.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    kv_dtype = options.get("kv_dtype", "auto")
    packed = open_packed(directory) if is_packed(directory) else None
    if packed is not None:
        if adapter is not None:
            raise UnavailableError(f"{directory} is quantized and takes no adapter: merge it before quantizing")
        form, own = packed.form, packed.config
    else:
        opened = open_directory(directory)
        form, own = float_format(opened, dtype), opened.config
    planned_kv = kv_dtype if kv_dtype != "auto" else ("int8" if form.packed else "float32")
    plan = plan_memory(own, form, planned_kv, min(_LEAST_CONTEXT, own.max_positions))
    check_memory(plan)
    if packed is not None:
        arrays, where = _packed_arrays(packed, plan, weights, options.get("threads") or cpu_threads(), verify, progress)
    else:
        arrays = float_arrays(opened, form, None if adapter is None else open_adapter(adapter, own))
        arrays, where = _placed(arrays, plan, weights)
    return CpuDecoder(config or own, form, arrays, weights=where, **options)


def _packed_arrays(
    packed: PackedDirectory, plan: MemoryPlan, weights: str, threads: int, verify: bool, progress: ProgressReport
) -> tuple[Arrays, str]:
    """The arrays, and whether they are mapped or resident."""
    if choose_weights(weights, plan):
        try:
            return load_resident(packed, threads, verify=verify, progress=progress), "resident"
        except UnavailableError:  # only of the memory
            if weights == "resident":
                raise
    if verify:
        packed.verify(threads, progress)
    return packed.map(), "mapped"


def _placed(arrays: Arrays, plan: MemoryPlan, weights: str) -> tuple[Arrays, str]:
    """Unquantized arrays where they shall be, and whether that is mapped or resident."""
    if choose_weights(weights, plan):
        try:
            return copy_resident(arrays), "resident"
        except UnavailableError:
            if weights == "resident":
                raise
    return arrays, "mapped"
