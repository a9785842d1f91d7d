"""Every kernel compiles for GPUs that are not here, down to machine code; matrix units where they belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")

PROGRAM = Path(__file__).with_name("compile_kernels.py")
ROOT = Path(__file__).parents[3]


SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that a block can have (CUDA C++ Programming Guide, technical specifications)."""

STACK = 16
"""Bytes per thread that may not fit into registers: ptxas leaves four words of one product on sm_86."""

DEMANDING = (
    "gemv-int4", "gemv-planes", "gemm-int8-8", "gemm-int8-64", "gemm-planes-8", "gemm-planes-64", "gemm-fp8-8",
    "gemm-fp8-64", "gemm-int4-8", "gemm-int4-32", "down-int8", "down-bfloat16-16", "down-fp8", "residual_layer_norm-8",
    "decode_attention-int8-True", "cache_write-fp8-True", "progressive_up", "threshold", "dequantize-planes",
)  # fmt: skip
"""Of every kernel those that take most registers or shared memory."""


def compile_for(architecture: int, names: Sequence[str] = ()) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, str(PROGRAM), str(architecture), *names]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    compiled: dict[str, Any] = json.loads(result.stdout)
    for name, facts in compiled.items():
        assert facts["ptx"] and facts["cubin"], name
        assert facts["stack"] <= STACK and not facts["local"], f"{name} spills: {facts}"
        assert facts["shared"] <= SHARED_MEMORY[architecture], f"{name} takes too much shared memory: {facts}"
    return compiled


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", [86, 89, 120])
def test_demanding_kernels_fit_cards_with_less_shared_memory(architecture: int) -> None:
    compiled = compile_for(architecture, DEMANDING)
    assert len(compiled) > (22 if architecture == 86 else 30)
    assert any("fp8" in name for name in compiled) == (architecture >= 89)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles(architecture: int) -> None:
    compiled = compile_for(architecture)
    # fp8 needs compute capability 8.9.
    assert len(compiled) > (60 if architecture == 80 else 80)
    assert any("fp8" in name for name in compiled) == (architecture >= 89)
    for name, facts in compiled.items():
        tensor_cores = name.startswith("gemm") or (name.startswith("down") and "-1-" not in name)
        assert facts["mma"] == tensor_cores, f"{name}: matrix units {facts['mma']}"
        if name.startswith(("gemv", "decode_attention", "cache_write", "progressive")):
            assert facts["wide_loads"], f"{name} loads single words"
