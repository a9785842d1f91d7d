"""Whether the engine can run here, and models of which shape. `persimmon --version` asks, so torch stays out of it."""

from __future__ import annotations

import ctypes
import importlib.util

from persimmon.config import ModelConfig

_LARGEST_HEAD = 256
_LARGEST_ROW = 65_536

# CUdevice_attribute of the driver's interface: compute capability.
_MAJOR, _MINOR = 75, 76


def why_unavailable() -> str | None:
    """None when it can run here, else what is missing, in one line."""
    from importlib import metadata  # a slow import, and `persimmon --help` may come this way

    if importlib.util.find_spec("triton") is None:
        return "the cuda engine needs triton: pip install 'persimmon[gpu]' (linux)"
    torch = metadata.version("torch")
    if torch.endswith("+cpu"):
        return f"the cuda engine needs an NVIDIA GPU and a CUDA build of PyTorch, this is {torch}"
    capability = compute_capability()
    if capability is None:
        return "the cuda engine needs an NVIDIA GPU: the driver finds none"
    if capability < (8, 0):
        major, minor = capability
        return f"the cuda engine needs compute capability 8.0 (A100, RTX 30) or later, this GPU has {major}.{minor}"
    return None


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU, by the driver; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else (major.value, minor.value)


def why_unfit(config: ModelConfig) -> str | None:
    """None for a shape that the kernels can run, else why not."""
    if config.head_dim > _LARGEST_HEAD:
        return f"the cuda engine needs head_dim up to {_LARGEST_HEAD}, got {config.head_dim}"
    if config.hidden_size > _LARGEST_ROW:
        return f"the cuda engine needs hidden_size up to {_LARGEST_ROW}, got {config.hidden_size}"
    return None
