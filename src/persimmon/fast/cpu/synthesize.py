"""Random models with a chosen share of active neurons, for benchmarks and memory planning. They say nothing sensible.

Weights are normal with the release's 0.02. A few input columns of the MLPs have a large LayerNorm gain, as trained
models have. Pre-activations are then close to normal with a known deviation s, and a bias of -z s, with z the quantile
of the wanted share, leaves that share positive. What this cannot show: which neurons are active together (a real
model's tokens share more of them), and how sparse a real model is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.checkpoints.tensors import CHUNK_BYTES
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import packed_format
from persimmon.fast.cpu.packing import Packer
from persimmon.fast.cpu.quantize import PackedWriter
from persimmon.fast.cpu.sources import SLICE_BYTES, Floats
from persimmon.fast.cpu.weights import to_bfloat16
from persimmon.machine import cpu_threads

_WEIGHT_STD = 0.02  # adept-inference megatron/model/utils.py
_OUTLIERS = 12
_OUTLIER_GAIN = 10.0


class SyntheticSource:
    """Random tensors by our names; every slice depends on seed, name and place alone."""

    def __init__(self, config: ModelConfig, active: float, seed: int) -> None:
        if not 0.0 < active < 1.0:
            raise InputError(f"active must be a share between 0 and 1, got {active}")
        self._config, self._seed = config, seed
        gain = self.vector("layers.0.post_attention_layernorm.weight")
        deviation = _WEIGHT_STD * math.sqrt(float((gain * gain).sum()))
        self._up_bias = np.float32(NormalDist().inv_cdf(active) * deviation)

    def vector(self, name: str) -> Floats:
        """Norms, with outliers where MLPs read, and biases."""
        size = self._vector_size(name)
        if name.endswith("dense_h_to_4h.bias"):
            return np.full(size, self._up_bias, np.float32)
        if not name.endswith("layernorm.weight"):
            return np.zeros(size, np.float32)
        gain = np.ones(size, np.float32)
        if "post_attention" in name:
            gain[self._generator(name, 0).choice(size, min(_OUTLIERS, size), replace=False)] = _OUTLIER_GAIN
        return gain

    def rows(self, name: str) -> Iterator[tuple[int, Floats]]:
        """Slices of a matrix."""
        rows, columns = self.shape(name)
        yield from self._slices(name, rows, columns)

    def columns(self, name: str) -> Iterator[tuple[int, Floats]]:
        """Slices of a matrix's transpose."""
        rows, columns = self.shape(name)
        yield from self._slices(name, columns, rows)

    def shape(self, name: str) -> tuple[int, int]:
        """Of a matrix."""
        hidden, neurons, vocabulary = self._config.hidden_size, self._config.intermediate_size, self._config.vocab_size
        kinds = {
            "query_key_value.weight": (3 * hidden, hidden),
            "dense.weight": (hidden, hidden),
            "dense_h_to_4h.weight": (neurons, hidden),
            "dense_4h_to_h.weight": (hidden, neurons),
            "lm_head.weight": (vocabulary, hidden),
            "embed_tokens.weight": (vocabulary, hidden),
        }
        return next(shape for ending, shape in kinds.items() if name.endswith(ending))

    def _slices(self, name: str, rows: int, columns: int) -> Iterator[tuple[int, Floats]]:
        step = max(1, SLICE_BYTES // (4 * columns))
        for start in range(0, rows, step):
            shape = (min(step, rows - start), columns)
            yield start, self._generator(name, start).standard_normal(shape, np.float32) * np.float32(_WEIGHT_STD)

    def _vector_size(self, name: str) -> int:
        hidden = self._config.hidden_size
        if "q_layernorm" in name or "k_layernorm" in name:
            return self._config.head_dim
        if name.endswith("query_key_value.bias"):
            return 3 * hidden
        return self._config.intermediate_size if name.endswith("dense_h_to_4h.bias") else hidden

    def _generator(self, name: str, start: int) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed} {name} {start}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class _SyntheticMatrix:
    """A random matrix in bfloat16, as a tensor to write."""

    name: str
    source: SyntheticSource

    dtype = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    def chunks(self) -> Iterator[memoryview]:
        for _, rows in self.source.rows(self.name):
            data = to_bfloat16(rows).reshape(-1).view(np.uint8).data
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]


def synthesize(
    config: ModelConfig,
    target: Path,
    format_name: str,
    *,
    active: float = 0.1,
    seed: int = 0,
    threads: int | None = None,
    progress: ProgressReport = no_progress,
) -> None:
    """Write a packed directory of random weights without tokenizer.

    active: share of neurons that are positive. Raises InputError for a bad format, share or target.
    """
    form = packed_format(format_name)
    source = SyntheticSource(config, active, seed)
    threads = threads or cpu_threads()
    identity: dict[str, Any] = {"synthetic": {"active": active, "seed": seed}}
    writer = PackedWriter(target, config, form, "BF16", identity, threads, progress)
    writer.run(_SyntheticMatrix("embed_tokens.weight", source), Packer(source, config, form, threads, None))
    writer.write_config()
    writer.finish()
