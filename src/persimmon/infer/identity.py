"""What the keys and values of a text depend on besides its tokens, so that stored ones meet only their own model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig

_WHOLE_BYTES = 16 << 20
"""Weights up to this size are read whole; the shipped model has none above it."""

_PIECES, _PIECE_BYTES = 64, 256
"""What is read of larger ones, evenly spread: training or quantizing changes nearly every weight of a matrix."""


def fingerprint(config: ModelConfig, weights: Iterable[tuple[str, NDArray[np.uint8]]]) -> str:
    """A name for a model: 32 hexadecimal digits from its shape and its weights (flat bytes, in a fixed order)."""
    digest = hashlib.blake2b(digest_size=16)
    shape = dataclasses.asdict(config)
    del shape["rotary_precision"]  # compared by itself, for a clearer message
    digest.update(repr(sorted(shape.items())).encode())
    for name, data in weights:
        digest.update(f"{name} {data.size} ".encode())
        if data.size <= _WHOLE_BYTES:
            digest.update(np.ascontiguousarray(data).data)
        else:
            for start in np.linspace(0, data.size - _PIECE_BYTES, _PIECES).astype(int):
                digest.update(data[start : start + _PIECE_BYTES].tobytes())
    return digest.hexdigest()
