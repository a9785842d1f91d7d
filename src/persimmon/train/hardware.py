"""Machines a plan can be made for: peaks and memory are the makers' figures, the share reached is an assumption."""

from __future__ import annotations

import re
from dataclasses import dataclass

from persimmon.errors import InputError


@dataclass(frozen=True)
class Device:
    """One processor of a machine."""

    name: str
    memory_bytes: float
    peak_flops: float
    """FLOP/s of matrix products in the training dtype, dense."""
    mfu: float
    """Share of the peak that training is assumed to reach ..."""
    mfu_source: str
    """... and why."""
    bytes_per_activation: int = 2
    is_host: bool = False
    """Whether its memory is the host's, which also holds the copy that a checkpoint is written from."""


_TORCHTITAN = (
    "torchtitan's published 6,667 tokens/s per H100 for Llama 3.1 8B at 8,192 tokens, compiled, "
    "51.5 GFLOP per token by this project's count: 35 % of 989 TFLOP/s"
)

DEVICES = {
    # NVIDIA data sheets: A100 80GB SXM, H100 SXM, H200 SXM; bfloat16 without structured sparsity.
    "A100": Device("A100", 80e9, 312e12, 0.35, f"assumed as on an H100: {_TORCHTITAN}"),
    "H100": Device("H100", 80e9, 989e12, 0.35, _TORCHTITAN),
    "H200": Device("H200", 141e9, 989e12, 0.35, f"assumed as on an H100: {_TORCHTITAN}"),
    # 8 cores x 2 fused multiply-adds of 8 floats x 3 GHz = 0.77 TFLOP/s, of which half is assumed to be sustained.
    "LAPTOP": Device("laptop", 16e9, 0.77e12, 0.5, "assumed; eight AVX2 cores at 3 GHz, float32", 4, is_host=True),
}


def parse_hardware(text: str) -> tuple[int, Device]:
    """`8xH100` -> (8, H100); `laptop` -> (1, laptop). Raises InputError with the known names."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z]\w*)", text.strip())
    if not match or match[2].upper() not in DEVICES or match[1] == "0":
        raise InputError(f"hardware {text!r} is not NAME or NxNAME with one of {', '.join(DEVICES)} (such as 8xH100)")
    return int(match[1] or 1), DEVICES[match[2].upper()]
