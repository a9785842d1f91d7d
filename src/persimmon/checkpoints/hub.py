"""Models in the directories that transformers reads, as PersimmonModel: loaded lazily, saved exactly.

Loading builds the model on the meta device and puts memory-mapped tensors into it, so pages are read when they are
first used and no second copy of the weights ever exists. Saving writes what `directory.write_directory` describes.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from persimmon.checkpoints.directory import ModelDirectory, open_directory, write_directory
from persimmon.checkpoints.download import resolve
from persimmon.checkpoints.shards import DEFAULT_SHARD_BYTES, ProgressReport, no_progress
from persimmon.checkpoints.tensors import CHUNK_BYTES, WEIGHT_TYPES, DerivedTensor, StoredTensor, TensorData, num_bytes
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, InputError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer

__all__ = ["as_tensor_data", "converted", "load_model", "map_tensor", "resolve", "save_model"]

_TORCH_TYPES: dict[str, torch.dtype] = {name: getattr(torch, word) for name, word in WEIGHT_TYPES.items()}
_STORED_TYPES = {dtype: name for name, dtype in _TORCH_TYPES.items()}
_MAPPED_TYPES = {**_TORCH_TYPES, "U8": torch.uint8, "I32": torch.int32}  # packed weights as well

_NO_FLOAT16 = "relu(x)^2 leaves the range of float16 once x passes 255.9"


# -- loading -------------------------------------------------------------------------------------------------


def load_model(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PersimmonModel:
    """The model of a directory, every tensor checked against its configuration.

    dtype: None keeps the files' own type, except that float16 becomes bfloat16 with a warning. On the CPU, tensors that
    keep their type stay memory-mapped (copy on write); the peak of resident memory is the size of the weights.

    Raises NotFoundError, or CheckpointError naming file, tensor, what was expected and what was found.
    """
    opened = open_directory(Path(directory))
    target = _compute_type(opened, dtype)
    with torch.device("meta"):
        model = PersimmonModel(opened.config)
    state = {name: map_tensor(tensor).to(device=device, dtype=target) for name, tensor in opened.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _compute_type(opened: ModelDirectory, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        if opened.dtype == "mixed":
            raise CheckpointError(f"{opened.path}: the weights differ in type; say which one to compute in")
        if opened.dtype == "float16":
            warnings.warn(f"{opened.path}: float16 weights are loaded as bfloat16: {_NO_FLOAT16}", stacklevel=3)
            return torch.bfloat16
        dtype = getattr(torch, opened.dtype)
    if dtype == torch.float16 or dtype not in _STORED_TYPES:
        reason = f": {_NO_FLOAT16}" if dtype == torch.float16 else ""
        raise InputError(f"dtype must be bfloat16, float32 or float64, got {dtype}{reason}")
    return dtype


def map_tensor(stored: StoredTensor) -> Tensor:
    """The tensor without reading it: pages come from the file when they are touched; writing changes only memory."""
    size, dtype = num_bytes(stored), _MAPPED_TYPES[stored.dtype]
    if size == 0:
        return torch.empty(stored.shape, dtype=dtype)
    inside = stored.offset % mmap.ALLOCATIONGRANULARITY
    with stored.file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), inside + size, offset=stored.offset - inside, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=inside)
    if inside % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(stored.shape)


# -- saving --------------------------------------------------------------------------------------------------


def save_model(
    model: PersimmonModel | Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    directory: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    extra: Callable[[Path], None] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> None:
    """Write a model directory: configuration, weights, tokenizer, generation settings, checksums.

    `model` may be tensors by our names, with their `config`. `dtype` converts on the way. `extra` as in
    `write_directory`. The directory appears
    whole or not at all; an existing one gets its model replaced and keeps other files.
    """
    if isinstance(model, PersimmonModel):
        config, tensors = config or model.config, model.state_dict()
    else:
        tensors = dict(model)
    if config is None:
        raise InputError("tensors without a model need their config")
    data = {
        name: _MemoryTensor(name, tensor, _stored_type(name, dtype or tensor.dtype)) for name, tensor in tensors.items()
    }
    write_directory(
        Path(directory), config, data, tokenizer, extra=extra, max_shard_bytes=max_shard_bytes, progress=progress
    )


def as_tensor_data(name: str, tensor: Tensor) -> TensorData:
    """A tensor in memory in the form that files are written from."""
    return _MemoryTensor(name, tensor, _stored_type(name, tensor.dtype))


def _stored_type(name: str, dtype: torch.dtype) -> str:
    if dtype not in _STORED_TYPES:
        known = ", ".join(WEIGHT_TYPES.values())
        raise InputError(f"{name}: weights are stored as {known}, not as {str(dtype).removeprefix('torch.')}")
    return _STORED_TYPES[dtype]


@dataclass(frozen=True)
class _MemoryTensor:
    """A tensor in memory, on any device, streamed as `dtype`."""

    name: str
    tensor: Tensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def chunks(self) -> Iterator[memoryview]:
        flat = self.tensor.detach().reshape(-1)
        for piece in flat.split(CHUNK_BYTES // 8):
            yield _bytes(piece.to(device="cpu", dtype=_TORCH_TYPES[self.dtype]))


@dataclass(frozen=True)
class _ConvertedTensor(DerivedTensor):
    """A tensor in another element type, converted as it is read."""

    def chunks(self) -> Iterator[memoryview]:
        for chunk in self.source.chunks():
            yield _bytes(torch.frombuffer(chunk, dtype=_TORCH_TYPES[self.source.dtype]).to(_TORCH_TYPES[self.dtype]))


def converted(tensor: TensorData, dtype: torch.dtype) -> TensorData:
    """The tensor's values rounded to `dtype`; itself when it has that type."""
    stored = _stored_type(tensor.name, dtype)
    return tensor if tensor.dtype == stored else _ConvertedTensor(tensor, stored)


def _bytes(piece: Tensor) -> memoryview:
    return piece.contiguous().view(torch.uint8).numpy().data
