"""One layer, the embedding or the head of a checkpoint as packed arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.fast.cpu.formats import (
    OUTLIERS,
    SUPERBLOCK,
    Format,
    PackedTensor,
    head_tensors,
    layer_tensors,
    row_bytes,
    superblocks,
    top_parts,
)
from persimmon.fast.cpu.native_module import native
from persimmon.fast.cpu.sources import Floats, Source

Array = NDArray[Any]
Arrays = dict[str, Array]


class Packer:
    """Packs a checkpoint's tensors into a format."""

    def __init__(
        self, source: Source, config: ModelConfig, form: Format, threads: int, outliers: Mapping[int, Array] | None
    ) -> None:
        self._source, self._config, self._form = source, config, form
        self._threads = threads
        self._outliers = outliers or {}
        self._native = native()

    def layer(self, index: int) -> Arrays:
        """All tensors of a layer."""
        specs = layer_tensors(self._config, self._form, index)
        arrays: Arrays = _uninitialized(specs)
        arrays |= {spec.name: self._source.vector(spec.name) for spec in specs if spec.dtype == "F32"}
        prefix = f"layers.{index}."
        for name, norm in (("self_attn.query_key_value", "input_layernorm"), ("self_attn.dense", None)):
            self._rows(arrays, prefix + name, self._form.attention, norm and prefix + norm)
        self._mlp(arrays, prefix, index)
        return {spec.name: arrays[spec.name] for spec in specs}

    def head(self) -> Arrays:
        """Final norm and head."""
        specs = head_tensors(self._config, self._form)
        arrays: Arrays = _uninitialized(specs)
        center, energy = self._source.vector("final_layernorm.bias"), self._source.vector("final_layernorm.weight") ** 2
        for start, rows in self._source.rows("lm_head.weight"):
            part = slice(start, start + len(rows))
            top, rest = arrays["lm_head.top"][part], arrays["lm_head.rest"][part]
            self._native.pack_planes(rows, center, energy, top, rest, self._threads)
        arrays |= {spec.name: self._source.vector(spec.name) for spec in specs if spec.dtype == "F32"}
        return {spec.name: arrays[spec.name] for spec in specs}

    def _mlp(self, arrays: Arrays, prefix: str, index: int) -> None:
        up, down = prefix + "mlp.dense_h_to_4h", prefix + "mlp.dense_4h_to_h"
        norm = prefix + "post_attention_layernorm"
        if self._form.mlp == "planes":
            self._planes(arrays, prefix, index)
            return
        self._rows(arrays, up, self._form.mlp, norm)
        if self._form.mlp == "q4":
            self._records(arrays[down + ".records"], down)
            return
        for start, rows in self._source.columns(down + ".weight"):
            out = arrays[down + ".neurons"][start : start + len(rows)]
            self._native.pack_neurons(rows, out, 0, self._threads)

    def _rows(self, arrays: Arrays, name: str, kind: str, norm: str | None) -> None:
        importance = None if norm is None else self._input_energy(norm)
        for start, rows in self._source.rows(name + ".weight"):
            out = arrays[name + ".weight"][start : start + len(rows)]
            self._native.pack_rows(kind, rows, out, importance, self._threads)

    def _records(self, out: Array, name: str) -> None:
        """A q4 down projection: int4 in groups of 32 neurons."""
        out[:] = 0
        width = superblocks(self._config.hidden_size) * SUPERBLOCK
        for start, rows in self._source.rows(name + ".weight"):
            self._native.pack_int4_records(rows, start, width, out, self._threads)

    def _planes(self, arrays: Arrays, prefix: str, index: int) -> None:
        """A p44 MLP. Its inputs lie around the bias of the norm before it: there the top rows' estimates are best."""
        hot, cold = arrays[prefix + "mlp.hot"], arrays[prefix + "mlp.cold"]
        norm, columns = prefix + "post_attention_layernorm", self._outliers.get(index)
        if columns is None:
            columns = largest_columns(self._input_energy(norm))
        arrays[prefix + "mlp.outlier_columns"] = columns
        kept = columns[columns >= 0]
        center = self._source.vector(norm + ".bias").copy()
        energy = self._source.vector(norm + ".weight") ** 2
        center[kept] = energy[kept] = 0.0
        _, at, end = top_parts(self._config.hidden_size)
        for start, rows in self._source.rows(prefix + "mlp.dense_h_to_4h.weight"):
            part = slice(start, start + len(rows))
            exact = np.zeros((len(rows), OUTLIERS), np.float16)
            exact[:, : kept.size] = rows[:, kept]
            rows = rows.copy() if not rows.flags.writeable else rows
            rows[:, kept] = 0.0
            self._native.pack_planes(rows, center, energy, hot[part], cold[part], self._threads)
            hot[part, at:end] = exact.view(np.uint8)
        offset = row_bytes("rest", self._config.hidden_size)
        for start, rows in self._source.columns(prefix + "mlp.dense_4h_to_h.weight"):
            self._native.pack_neurons(rows, cold[start : start + len(rows)], offset, self._threads)

    def _input_energy(self, norm: str) -> Floats:
        """Mean square of every output of a LayerNorm if its normalised inputs have variance 1."""
        weight, bias = self._source.vector(norm + ".weight"), self._source.vector(norm + ".bias")
        return weight * weight + bias * bias


def largest_columns(energy: Floats) -> NDArray[np.int32]:
    """The OUTLIERS columns with the largest energy, ascending, padded with -1."""
    count = min(OUTLIERS, energy.size)
    columns = np.full(OUTLIERS, -1, np.int32)
    columns[:count] = np.sort(np.argsort(-energy, kind="stable")[:count])
    return columns


def _uninitialized(specs: Sequence[PackedTensor]) -> Arrays:
    """Room for the packed matrices."""
    return {spec.name: np.empty(spec.shape, np.uint8) for spec in specs if spec.dtype == "U8"}
