"""Rows of a hub checkpoint's tensors as float32, read from the memory-mapped file piece by piece. No torch."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints.directory import ModelDirectory
from persimmon.checkpoints.tensors import StoredTensor, num_bytes
from persimmon.errors import CheckpointError

Floats = NDArray[np.float32]

NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I32": "<i4"}
"""Of the element types of safetensors files; bfloat16 as its bits."""

SLICE_BYTES = 64 << 20
"""Most float32 bytes of a matrix in memory at a time."""


def map_array(stored: StoredTensor) -> NDArray[np.generic]:
    """The tensor's elements without reading them; bfloat16 as uint16. The mapping lives as long as the array."""
    dtype = np.dtype(NUMPY_TYPES[stored.dtype])
    size = num_bytes(stored)
    if size == 0:
        return np.empty(stored.shape, dtype)
    inside = stored.offset % mmap.ALLOCATIONGRANULARITY
    with stored.file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), inside + size, offset=stored.offset - inside, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype, size // dtype.itemsize, inside).reshape(stored.shape)


def to_float32(values: NDArray[np.generic], dtype: str) -> Floats:
    """Exact float32 of F32, F16 or BF16 (as uint16) elements; F64 is rounded."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


class Source(Protocol):
    """Where the packer gets a model's tensors, by our names."""

    def vector(self, name: str) -> Floats:
        """A whole small tensor."""

    def rows(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) of a matrix, in slices of at most SLICE_BYTES."""

    def columns(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first column, columns as rows) of a matrix: slices of its transpose."""


class FloatSource:
    """A hub directory's tensors."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def vector(self, name: str) -> Floats:
        """A whole small tensor."""
        stored = self._directory.tensors[name]
        return self._checked(name, to_float32(map_array(stored), stored.dtype))

    def rows(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) of a matrix, in slices of at most SLICE_BYTES."""
        stored = self._directory.tensors[name]
        step = max(1, SLICE_BYTES // (4 * stored.shape[1]))
        for start in range(0, stored.shape[0], step):
            part = stored.rows(start, min(start + step, stored.shape[0]))
            yield start, self._checked(name, to_float32(map_array(part), stored.dtype))

    def columns(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first column, columns as rows) of a matrix: slices of its transpose."""
        stored = self._directory.tensors[name]
        matrix = map_array(stored)
        step = max(1, SLICE_BYTES // (4 * stored.shape[0]))
        for start in range(0, stored.shape[1], step):
            part = np.ascontiguousarray(matrix[:, start : start + step].T)
            yield start, self._checked(name, to_float32(part, stored.dtype))

    def _checked(self, name: str, values: Floats) -> Floats:
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._directory.path}: {name} holds values that are not finite")
        return values
