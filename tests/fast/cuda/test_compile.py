"""Every kernel compiles for GPUs that are not here, down to machine code; matrix units where they belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")

PROGRAM = Path(__file__).with_name("compile_kernels.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles(architecture: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, str(PROGRAM), str(architecture)]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    compiled = json.loads(result.stdout)
    # fp8 needs compute capability 8.9.
    assert len(compiled) > (60 if architecture == 80 else 85)
    assert any("fp8" in name for name in compiled) == (architecture >= 89)
    for name, facts in compiled.items():
        assert facts["ptx"] and facts["cubin"], name
        assert not facts["local_memory"], f"{name} keeps variables in memory"
        tensor_cores = (name.startswith("gemm") and "float32" not in name) or "-16-True" in name
        assert facts["mma"] == tensor_cores, f"{name}: matrix units {facts['mma']}"
        if name.startswith(("gemv", "decode_attention", "cache_write", "progressive")):
            assert facts["wide_loads"], f"{name} loads single words"
