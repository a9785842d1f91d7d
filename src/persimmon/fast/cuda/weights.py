"""A model's weights on the device, in the kernels' layouts, from a hub directory, a packed one, or a model in memory.

Tensors are read, moved and arranged one by one, large ones in slices: beyond the result, the largest of them as it is
stored is the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon.checkpoints.adapters import Adapter
from persimmon.checkpoints.directory import ModelDirectory
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cpu.packed import PackedDirectory
from persimmon.fast.cpu.sources import map_array
from persimmon.fast.cuda import layouts
from persimmon.fast.cuda.layouts import SLICE_NUMBERS, Matrix, row_slices
from persimmon.lora import low_rank_update
from persimmon.model import PersimmonModel, rotary_tables

WEIGHT_FORMATS = ("float32", "bfloat16", "fp8", "q8", "q4", "p44")

ReadTensor = Callable[[str], Tensor]
"""A tensor by our name, on the device, in the dtype it should have."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm, float32."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm
    post_norm: Norm
    qk_norms: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Weight and bias for queries, then for keys."""
    query_key_value: Matrix
    query_key_value_bias: Tensor
    dense: Matrix
    dense_bias: Tensor
    up: Matrix
    up_bias: Tensor
    down: Matrix
    """Neuron-major, but for q4."""
    down_bias: Tensor


@dataclass(frozen=True)
class Weights:
    """All of a model."""

    config: ModelConfig
    format: str
    dtype: torch.dtype
    """Of activations."""
    embedding: Tensor
    layers: list[Layer]
    final_norm: Norm
    head: Matrix
    rotary: tuple[Tensor, Tensor]
    """Cos and sin [positions, R / 2], float32, in the config's rotary precision."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.embedding.device


def from_model(model: PersimmonModel, *, fp8: bool = False) -> Weights:
    """Of a model in memory, on its device; its own bits, or rounded to fp8."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return _arrange(model.config, state.__getitem__, model.embed_tokens.weight.dtype, fp8)


def from_directory(
    directory: ModelDirectory, config: ModelConfig, dtype: str, device: torch.device, adapter: Adapter | None = None
) -> Weights:
    """Of a hub directory, as float32, bfloat16 or fp8 (which rounds matrices and computes in bfloat16).

    adapter: merged into the weights, added in float32 and rounded once to the type they run in.
    """
    if dtype not in ("float32", "bfloat16", "fp8"):
        raise InputError(f"unpacked weights run as float32, bfloat16 or fp8, got {dtype!r}")
    kind = torch.float32 if dtype == "float32" else torch.bfloat16

    def read(name: str) -> Tensor:
        stored = directory.tensors[name]
        pair = adapter.pairs.get(name.removesuffix(".weight")) if adapter is not None else None
        if adapter is not None and pair is not None:
            a, b = (_tensor(map_array(part), part.dtype).to(device) for part in pair)
            values = _tensor(map_array(stored), stored.dtype).to(device)
            return (values.float() + low_rank_update(a, b, adapter.settings.scale)).to(kind)
        return _moved(map_array(stored), stored.dtype, kind, device)

    return _arrange(config, read, kind, dtype == "fp8")


def _moved(values: NDArray[Any], dtype: str, kind: torch.dtype, device: torch.device) -> Tensor:
    """A mapped array on the device as `kind`, without a second copy of a large one in either type."""
    if values.ndim != 2 or values.size <= SLICE_NUMBERS:
        return _tensor(values, dtype).to(device).to(kind)
    out = torch.empty(values.shape, dtype=kind, device=device)
    for part in row_slices(*values.shape):
        out[part] = _tensor(values[part], dtype).to(device)
    return out


def _tensor(values: NDArray[Any], dtype: str) -> Tensor:
    """A mapped array as a tensor; bfloat16 arrives as uint16. The copy is what a GPU transfer needs anyway."""
    if dtype == "BF16":
        return torch.from_numpy(np.array(values)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def _arrange(config: ModelConfig, read: ReadTensor, dtype: torch.dtype, fp8: bool) -> Weights:
    """Plain weights."""
    matrix = layouts.fp8 if fp8 else layouts.plain

    def layer(index: int) -> Layer:
        prefix = f"layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            *_norms(read, prefix, config.qk_layernorm),
            matrix(read(attention + "query_key_value.weight")), read(attention + "query_key_value.bias").float(),
            matrix(read(attention + "dense.weight")), read(attention + "dense.bias").float(),
            matrix(read(mlp + "dense_h_to_4h.weight")), read(mlp + "dense_h_to_4h.bias").float(),
            matrix(read(mlp + "dense_4h_to_h.weight"), neuron_major=True), read(mlp + "dense_4h_to_h.bias").float(),
        )  # fmt: skip

    name = "fp8" if fp8 else str(dtype).removeprefix("torch.")
    embedding = read("embed_tokens.weight")
    return Weights(
        config, name, dtype, embedding, [layer(i) for i in range(config.num_layers)], _norm(read, "final_layernorm"),
        matrix(read("lm_head.weight")), _rotary(config, embedding.device),
    )  # fmt: skip


def from_packed(
    packed: PackedDirectory, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Weights:
    """Of a q8, q4 or p44 directory: the same numbers, rearranged. Activations are in `dtype`."""

    def read(name: str) -> Tensor:
        stored = packed.tensors[name]
        return _tensor(map_array(stored), stored.dtype).to(device)

    form, hidden, neurons = packed.form, config.hidden_size, config.intermediate_size
    rows = layouts.from_q8 if form.attention == "q8" else layouts.from_q4

    def mlp(prefix: str) -> tuple[Matrix, Matrix]:
        if form.mlp == "planes":
            return layouts.from_p44(
                read(prefix + "hot"), read(prefix + "cold"), read(prefix + "outlier_columns"), hidden
            )
        if form.mlp == "q4":
            up = layouts.from_q4(read(prefix + "dense_h_to_4h.weight"), hidden)
            return up, layouts.from_records(read(prefix + "dense_4h_to_h.records"), hidden, neurons)
        up = layouts.from_q8(read(prefix + "dense_h_to_4h.weight"), hidden)
        return up, layouts.from_neurons(read(prefix + "dense_4h_to_h.neurons"), hidden)

    def layer(index: int) -> Layer:
        prefix = f"layers.{index}."
        attention = prefix + "self_attn."
        up, down = mlp(prefix + "mlp.")
        return Layer(
            *_norms(read, prefix, config.qk_layernorm),
            rows(read(attention + "query_key_value.weight"), hidden), read(attention + "query_key_value.bias"),
            rows(read(attention + "dense.weight"), hidden), read(attention + "dense.bias"),
            up, read(prefix + "mlp.dense_h_to_4h.bias"), down, read(prefix + "mlp.dense_4h_to_h.bias"),
        )  # fmt: skip

    head = layouts.from_head_planes(read("lm_head.top"), read("lm_head.rest"), hidden)
    return Weights(
        config, form.name, dtype, read("embed_tokens.weight"), [layer(i) for i in range(config.num_layers)],
        _norm(read, "final_layernorm"), head, _rotary(config, device),
    )  # fmt: skip


def _norm(read: ReadTensor, name: str) -> Norm:
    return Norm(read(name + ".weight").float(), read(name + ".bias").float())


def _norms(read: ReadTensor, prefix: str, qk: bool) -> tuple[Norm, Norm, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """The norms of a layer."""
    qk_norms = None
    if qk:
        q, k = (_norm(read, f"{prefix}self_attn.{which}_layernorm") for which in "qk")
        qk_norms = (q.weight, q.bias, k.weight, k.bias)
    return _norm(read, prefix + "input_layernorm"), _norm(read, prefix + "post_attention_layernorm"), qk_norms


def _rotary(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_tables(config, torch.arange(config.max_positions))
    return cos.contiguous().to(device), sin.contiguous().to(device)
