"""A CudaDecoder from a model directory, packed or not; refused before loading when the GPU cannot hold it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from persimmon.checkpoints.adapters import open_adapter
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.config import ModelConfig
from persimmon.errors import InputError, UnavailableError
from persimmon.fast.cpu.packed import is_packed, open_packed
from persimmon.fast.cuda import weights
from persimmon.fast.cuda.choice import table_for
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.plan import GIB, RESERVE_BYTES, GpuPlan, choose
from persimmon.machine import cpu_threads

_CPU_MEMORY = 64 * GIB
"""What the planner assumes where there is no GPU: the interpreter runs tiny models only."""

_OWN_SEQUENCES = 2
"""Whole contexts that the decoder's own cache holds where they fit: a chat and something beside it."""


def load_decoder(
    directory: Path,
    config: ModelConfig | None = None,
    *,
    device: str = "cuda",
    dtype: str = "bfloat16",
    context: int | None = None,
    kv_dtype: str = "auto",
    fp8: bool = False,
    sparsity_margin: float = math.inf,
    kernel_table: str | Path | None = None,
    adapter: Path | None = None,
    verify: bool = True,
    progress: ProgressReport = no_progress,
) -> CudaDecoder:
    """Load a model directory for the CUDA engine.

    config: replaces the directory's own, for another rotary precision. dtype: of unpacked weights. fp8: round unpacked
    matrices to e4m3 (compute capability 8.9 and later). kernel_table: see choice.py. adapter: directory of a LoRA
    adapter, merged into unpacked weights. verify: compare the fingerprints
    of packed files. The others as in CudaDecoder and `plan.choose`, whose UnavailableError says what is missing.
    """
    where = torch.device(device)
    if adapter is not None and is_packed(directory):
        raise UnavailableError(f"{directory} is quantized and takes no adapter: merge it before quantizing")
    packed = open_packed(directory) if is_packed(directory) else None
    opened = open_directory(directory) if packed is None else None
    own = packed.config if packed is not None else opened.config if opened is not None else config
    assert own is not None, "a directory has a configuration"
    config = config or own
    if fp8 and packed is not None:
        raise InputError(f"fp8 applies to unpacked weights, these are {packed.form.name}")
    weight_format = packed.form.name if packed is not None else "fp8" if fp8 else dtype
    _check_fp8(where, fp8 or kv_dtype == "fp8")
    chosen = plan_for(config, where, weight_format, kv_dtype, context)
    if packed is not None:
        if verify:
            packed.verify(cpu_threads(), progress)
        loaded = weights.from_packed(packed, config, where)
    else:
        assert opened is not None, "either form is open"
        lora = open_adapter(adapter, own) if adapter is not None else None
        loaded = weights.from_directory(opened, config, weight_format, where, lora)
    if where.type == "cuda":
        torch.cuda.empty_cache()  # what loading freed: the cache's budget counts what the driver has
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else "none"
    table, _ = table_for(gpu, Path(kernel_table) if kernel_table is not None else None)
    return CudaDecoder(
        loaded, context=chosen.context, cache_tokens=chosen.context * min(_OWN_SEQUENCES, chosen.sequences),
        kv_dtype=chosen.kv_dtype, table=table, sparsity_margin=sparsity_margin, max_pass_tokens=chosen.pass_tokens,
    )  # fmt: skip


def plan_for(
    config: ModelConfig, device: torch.device, weight_format: str, kv_dtype: str, context: int | None
) -> GpuPlan:
    """How a model of that format runs on a device, by the memory that is free now."""
    memory, reserve = _CPU_MEMORY, 0
    if device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(device)  # the context is there already: half of the reserve
        reserve = RESERVE_BYTES // 2
    return choose(config, memory, formats=(weight_format,), kv_dtype=kv_dtype, context=context, reserve=reserve)


def _check_fp8(device: torch.device, wanted: bool) -> None:
    if wanted and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise UnavailableError(
            f"fp8 needs compute capability 8.9 (RTX 40, H100) or later, this GPU has {major}.{minor}"
        )
