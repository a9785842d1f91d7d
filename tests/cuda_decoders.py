"""The CUDA engine's decoder over a model in memory, in Triton's interpreter unless tests run on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import interpreter_environment  # isort: skip - before triton

from persimmon.fast.cuda.choice import SPARSE
from persimmon.infer.decoder import Decoder
from persimmon.model import PersimmonModel

__all__ = ["SPARSE", "cuda_decoder"]


def cuda_decoder(model: PersimmonModel, **options: Any) -> Decoder:
    """In the model's precision, with room for a whole context; skips the test, saying why, without triton."""
    import triton_interpreter  # noqa: F401 - skips
    from persimmon.fast.cuda import weights
    from persimmon.fast.cuda.decoder import CudaDecoder

    on_cpu = interpreter_environment.DEVICE == "cpu"
    moved = model if on_cpu else copy.deepcopy(model).to(interpreter_environment.DEVICE)
    options.setdefault("cache_tokens", model.config.max_positions + 1024)
    return CudaDecoder(weights.from_model(moved), **options)
