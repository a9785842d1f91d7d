"""Whether the engine can run here, and models of which shape. Imports neither torch nor triton before it is asked."""

from __future__ import annotations

import importlib.util

from persimmon.config import ModelConfig

_LARGEST_HEAD = 256
_LARGEST_ROW = 65_536


def why_unavailable() -> str | None:
    """None when it can run here, else what is missing, in one line."""
    if importlib.util.find_spec("triton") is None:
        return "the cuda engine needs triton: pip install 'persimmon[gpu]' (linux)"
    import torch

    if not torch.cuda.is_available():
        return f"the cuda engine needs an NVIDIA GPU: PyTorch {torch.__version__} finds none"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the cuda engine needs compute capability 8.0 (A100, RTX 30) or later, this GPU has {major}.{minor}"
    return None


def why_unfit(config: ModelConfig) -> str | None:
    """None for a shape that the kernels can run, else why not."""
    if config.head_dim > _LARGEST_HEAD:
        return f"the cuda engine needs head_dim up to {_LARGEST_HEAD}, got {config.head_dim}"
    if config.hidden_size > _LARGEST_ROW:
        return f"the cuda engine needs hidden_size up to {_LARGEST_ROW}, got {config.hidden_size}"
    return None
