"""A CpuDecoder from a model directory, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persimmon.checkpoints.adapters import open_adapter
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.config import ModelConfig
from persimmon.errors import UnavailableError
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.memory import check_memory, plan_memory
from persimmon.fast.cpu.packed import is_packed, open_packed
from persimmon.fast.cpu.weights import float_arrays, float_format
from persimmon.machine import cpu_threads

_LEAST_CONTEXT = 512  # tokens that must fit for loading to make sense


def load_decoder(
    directory: Path,
    config: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    adapter: Path | None = None,
    verify: bool = True,
    progress: ProgressReport = no_progress,
    **options: Any,
) -> CpuDecoder:
    """Load a model directory for the CPU engine.

    config: replaces the directory's own, for another rotary precision. dtype: bfloat16 rounds float32 weights to it.
    adapter: directory of a LoRA adapter, merged into the weights in memory.
    verify: compare the fingerprints of packed files. options: those of CpuDecoder.
    Raises CheckpointError for damaged files, UnavailableError when the memory cannot hold the model.
    """
    kv_dtype = options.get("kv_dtype", "auto")
    if is_packed(directory):
        if adapter is not None:
            raise UnavailableError(f"{directory} is quantized and takes no adapter: merge it before quantizing")
        packed = open_packed(directory)
        form, own = packed.form, packed.config
    else:
        opened = open_directory(directory)
        form, own = float_format(opened, dtype), opened.config
    planned_kv = kv_dtype if kv_dtype != "auto" else ("int8" if form.packed else "float32")
    check_memory(plan_memory(own, form, planned_kv, min(_LEAST_CONTEXT, own.max_positions)))
    if is_packed(directory):
        if verify:
            packed.verify(options.get("threads") or cpu_threads(), progress)
        arrays = packed.map()
    else:
        arrays = float_arrays(opened, form, None if adapter is None else open_adapter(adapter, own))
    return CpuDecoder(config or own, form, arrays, **options)
