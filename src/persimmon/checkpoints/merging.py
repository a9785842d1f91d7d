"""`persimmon merge`: a model and its adapter become one model directory, tensor by tensor in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from persimmon.checkpoints.adapters import Adapter, open_adapter
from persimmon.checkpoints.convert import write_copy
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.hub import converted, map_tensor
from persimmon.checkpoints.releases import derived_notice
from persimmon.checkpoints.shards import DEFAULT_SHARD_BYTES, ProgressReport, no_progress
from persimmon.checkpoints.staging import check_apart
from persimmon.checkpoints.tensors import WEIGHT_TYPES, DerivedTensor, StoredTensor, TensorData
from persimmon.lora import low_rank_update

_SLICE_BYTES = 64 << 20
"""Most float32 bytes of a matrix in memory at a time."""


@dataclass(frozen=True)
class _MergedMatrix(DerivedTensor):
    """W + scale * B A, added in float32 and rounded once."""

    source: StoredTensor
    pair: tuple[StoredTensor, StoredTensor]
    scale: float

    def chunks(self) -> Iterator[memoryview]:
        a, b = (map_tensor(tensor) for tensor in self.pair)
        rows, columns = self.shape
        step = max(1, _SLICE_BYTES // (4 * columns))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            part = map_tensor(self.source.rows(start, stop)).float() + low_rank_update(a, b[start:stop], self.scale)
            merged = part.to(getattr(torch, WEIGHT_TYPES[self.dtype]))
            yield merged.contiguous().view(torch.uint8).numpy().reshape(-1).data


def merge(
    model: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> tuple[dict[str, TensorData], Adapter, list[str]]:
    """Write the merged model: its tensors as written, the adapter, and notes for a person.

    `dtype`: element type of the result, None for the model's own; bfloat16 rounds the merged matrices, float32 keeps
    the sum. Raises as `open_directory` and `open_adapter`.
    """
    check_apart(model, target)
    source = open_directory(model)
    opened = open_adapter(adapter, source.config)
    changed: dict[str, TensorData] = {}
    for name, pair in opened.pairs.items():
        stored = source.tensors[f"{name}.weight"]
        kind = stored.dtype if dtype is None else converted(stored, dtype).dtype
        changed[stored.name] = _MergedMatrix(stored, kind, pair, opened.settings.scale)
    notice = derived_notice(model)
    note = f"Merged with the LoRA adapter `{adapter.resolve().name}` (rank {opened.settings.rank})."
    tensors, notes = write_copy(
        source, target, dtype=dtype, changed=changed, card_note=f"{note} {notice}" if notice else note,
        max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip
    return tensors, opened, [*notes, *([notice] if notice else [])]
