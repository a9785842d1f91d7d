"""The CUDA engine's decoder over a model in memory, in Triton's interpreter unless tests run on a GPU."""

from __future__ import annotations

import copy
from typing import Any

from triton_interpreter import DEVICE  # isort: skip - sets the environment that triton reads

from persimmon.fast.cuda import weights
from persimmon.fast.cuda.choice import SPARSE
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.model import PersimmonModel

__all__ = ["SPARSE", "cuda_decoder"]


def cuda_decoder(model: PersimmonModel, **options: Any) -> CudaDecoder:
    """In the model's precision; room for a few whole contexts."""
    moved = model if DEVICE == "cpu" else copy.deepcopy(model).to(DEVICE)
    options.setdefault("cache_tokens", model.config.max_positions + 1024)
    return CudaDecoder(weights.from_model(moved), **options)
