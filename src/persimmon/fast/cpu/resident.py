"""Weights in memory of their own, in large pages, instead of in mapped files.

A mapped file is read through pages of 4 KiB, and a core that streams gigabytes a second waits for their addresses:
large pages (2 MiB, Linux's transparent huge pages) are worth 10 to 15% of the speed of decoding (docs/LOG.md,
2026-11-26), and about as much for a model of 18 MB. Copying and checking packed files are one pass, which takes 3 s
longer for the 8B than the check alone. The files are read and not mapped, so the model is in this process once; what
the system keeps of them besides is its page cache, which it drops when needed. Unquantized tensors are mapped, copied
one by one and let go.

What resident weights are not: shared with other processes that run the same model, and given back when memory is
short. The embedding stays mapped, as only the rows in use are ever read.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.checkpoints.tensors import StoredTensor, num_bytes
from persimmon.errors import UnavailableError
from persimmon.fast.cpu.memory import GIB, MemoryPlan
from persimmon.fast.cpu.packed import PackedDirectory
from persimmon.fast.cpu.sources import NUMPY_TYPES
from persimmon.machine import large_pages_offered, memory_available

WEIGHTS = ("auto", "mapped", "resident")

_LARGE_PAGE = 2 << 20  # x86-64 and, with pages of 4 KiB, ARM
_LINE = 64  # bytes of a cache line: tensors start on one
_SHARE_OF_MEMORY = 0.9
"""Of the free memory that `auto` lets a model take: what is resident cannot be given back under pressure."""

_MAPPED_TENSOR = "embed_tokens.weight"  # alone in its file


def choose_weights(wanted: str, plan: MemoryPlan) -> bool:
    """Whether the weights shall be resident; `wanted` is one of WEIGHTS."""
    if wanted != "auto":
        return wanted == "resident"
    free = memory_available()
    fits = free is not None and plan.total <= _SHARE_OF_MEMORY * free
    return large_pages_offered() and fits


def load_resident(
    packed: PackedDirectory, threads: int, *, verify: bool = True, progress: ProgressReport = no_progress
) -> dict[str, NDArray[Any]]:
    """Every tensor, copied and (with `verify`) checked in the same pass; the embedding mapped.

    Raises CheckpointError for a damaged file, UnavailableError when the system does not give the memory.
    """
    files = [file for file in packed.sizes if packed.tensors_of(file)[0].name != _MAPPED_TENSOR]
    places, size = _places(packed, files)
    arena = _arena(size)
    into = {file: arena[start : start + packed.sizes[file]] for file, start in places.items()}
    packed.read(threads, progress, into, verify=verify)
    arrays = packed.map([packed.tensors[_MAPPED_TENSOR]])
    for file in files:
        arrays |= {tensor.name: _view(tensor, into[file]) for tensor in packed.tensors_of(file)}
    return arrays


def copy_resident(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of an unquantized model, each copied to a cache line and taken out of `arrays`; the embedding as it is.

    Raises UnavailableError, before anything is taken, when the system does not give the memory.
    """
    sizes = {name: -(-array.nbytes // _LINE) * _LINE for name, array in arrays.items() if name != _MAPPED_TENSOR}
    arena, start = _arena(sum(sizes.values())), 0
    copies = {_MAPPED_TENSOR: arrays.pop(_MAPPED_TENSOR)}
    for name, size in sizes.items():
        array = arrays.pop(name)
        copies[name] = arena[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copies[name][...] = array
        copies[name].flags.writeable = False
        start += size
    return copies


def _places(packed: PackedDirectory, files: Sequence[str]) -> tuple[dict[str, int], int]:
    """Where each file starts, such that its tensors start on a cache line; and the bytes of all."""
    places, end = {}, 0
    for file in files:
        first = min(tensor.offset for tensor in packed.tensors_of(file))
        places[file] = end + -(end + first) % _LINE
        end = places[file] + packed.sizes[file]
    return places, end


def _arena(size: int) -> NDArray[np.uint8]:
    """Private memory of large pages where the system has them; it is taken as it is written."""
    try:
        memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise UnavailableError(f"the system does not give {size / GIB:.1f} GiB for the weights: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: small pages do as well
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _LARGE_PAGE
    return whole[start : start + size]


def _view(tensor: StoredTensor, data: NDArray[np.uint8]) -> NDArray[Any]:
    """A tensor of the file whose bytes are `data`."""
    part = data[tensor.offset : tensor.offset + num_bytes(tensor)]
    view: NDArray[Any] = part.view(NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)
    view.flags.writeable = False
    return view
