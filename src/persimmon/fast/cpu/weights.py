"""The arrays that the native model runs on: a packed directory as it is, or a hub checkpoint's own numbers.

Unpacked weights keep their bits: bfloat16 matrices are multiplied with float32 activations, which gives what float32
copies of them would. Matrices are used where they lie in the file; only the down projection is copied, turned
neuron-major so that zeros skip its rows, and rows that are no multiple of 256 long are padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints.adapters import Adapter
from persimmon.checkpoints.directory import ModelDirectory
from persimmon.config import ModelConfig
from persimmon.fast.cpu.formats import FORMATS, SUPERBLOCK, Format, embedding_tensors, head_tensors, layer_tensors
from persimmon.fast.cpu.sources import map_array, to_float32

Array = NDArray[Any]
Arrays = dict[str, Array]

Read = Callable[[str], Array]
"""A tensor by our name: float32, or bfloat16 as uint16."""


def float_format(directory: ModelDirectory, dtype: str) -> Format:
    """How an unpacked checkpoint runs: bfloat16 where that is what it holds or what was asked for, else float32."""
    return FORMATS["bfloat16" if "bfloat16" in (dtype, directory.dtype) else "float32"]


def float_arrays(directory: ModelDirectory, form: Format, adapter: Adapter | None = None) -> Arrays:
    """The arrays of an unpacked checkpoint, merged with an adapter: added in float32, rounded once in bfloat16."""
    stored_type = "BF16" if form.name == "bfloat16" else "F32"

    def read(name: str) -> Array:
        stored = directory.tensors[name]
        values = map_array(stored)
        module = name.removesuffix(".weight")
        if adapter is not None and module in adapter.pairs:
            merged = to_float32(values, stored.dtype) + low_rank_update(adapter, module)
            return merged if form.name == "float32" else to_bfloat16(merged)
        if stored.dtype == stored_type and values.ctypes.data % values.itemsize == 0:
            return values
        floats = to_float32(values, stored.dtype)
        return floats if form.name == "float32" or floats.ndim == 1 else to_bfloat16(floats)

    return arrange(directory.config, form, read)


def low_rank_update(adapter: Adapter, module: str) -> NDArray[np.float32]:
    """The update [out, in] of an adapted matrix: scale * B A."""
    a, b = (to_float32(map_array(tensor), tensor.dtype) for tensor in adapter.pairs[module])
    return np.float32(adapter.settings.scale) * (b @ a)


def arrange(config: ModelConfig, form: Format, read: Read) -> Arrays:
    """Unpacked tensors by the names, and in the layout, that the native model expects."""
    embedding = "BF16" if form.name == "bfloat16" else "F32"
    specs = [*embedding_tensors(config, embedding), *head_tensors(config, form)]
    for layer in range(config.num_layers):
        specs += layer_tensors(config, form, layer)
    arrays: Arrays = {}
    for spec in specs:
        if spec.name.endswith(".neurons"):
            source = read(spec.name.removesuffix(".neurons") + ".weight")
            arrays[spec.name] = padded_rows(np.ascontiguousarray(source.T))
        elif spec.dtype == "U8":
            arrays[spec.name] = padded_rows(read(spec.name))
        else:
            values = read(spec.name)
            arrays[spec.name] = to_float32(values, "BF16") if values.ndim == 1 and values.itemsize == 2 else values
    return arrays


def padded_rows(matrix: Array) -> Array:
    """The matrix with zeros at the end of its rows up to a multiple of 256, or itself."""
    extra = -matrix.shape[1] % SUPERBLOCK
    if not extra:
        return np.ascontiguousarray(matrix)
    return np.pad(matrix, ((0, 0), (0, extra)))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even, as bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
