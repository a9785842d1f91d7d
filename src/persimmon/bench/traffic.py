"""Bytes that a decoded token reads: every matrix by its format, less what the engine's own counts say it skipped.

Padding to whole superblocks counts, since it is read. Not counted: activations, which stay in the caches. Arithmetic
only, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from persimmon import accounting
from persimmon.config import ModelConfig
from persimmon.fast.cpu.formats import (
    FORMATS,
    GROUP,
    HEAD_BITS,
    UP_BITS,
    Format,
    hot_bytes,
    layer_tensors,
    record_parts,
    row_bytes,
    sketch_row_bytes,
    top_bytes,
)
from persimmon.fast.cpu.memory import kv_bytes_per_token

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class MlpUse:
    """Neurons of one layer that a token needs, as counted by the engine; means, so not whole numbers."""

    candidates: float
    """Whose exact pre-activation was computed."""
    active: float
    """Of them positive: whose down row was read."""
    groups: float = 0.0
    """q4: groups of 32 with an active neuron, whose scales were read."""


def all_neurons(config: ModelConfig) -> list[MlpUse]:
    """What a dense engine uses."""
    neurons = config.intermediate_size
    return [MlpUse(neurons, neurons, -(-neurons // GROUP))] * config.num_layers


def counted_neurons(counts: Sequence[Mapping[str, float]], config: ModelConfig) -> list[MlpUse]:
    """Means per token of the engine's counters; all neurons before the first token."""
    dense = all_neurons(config)[0]
    uses = []
    for layer in counts:
        tokens = layer["tokens"]
        counted = (layer["candidates"], layer["active"], layer.get("groups", 0))
        uses.append(MlpUse(*(count / tokens for count in counted)) if tokens else dense)
    return uses


def in_batch(uses: Sequence[MlpUse], batch: int, config: ModelConfig) -> list[MlpUse]:
    """Most neurons that `batch` tokens of one step can need together: no two alike, or all there are."""
    most = all_neurons(config)[0]
    return [
        MlpUse(
            min(most.candidates, batch * use.candidates),
            min(most.active, batch * use.active),
            min(most.groups, batch * use.groups),
        )
        for use in uses
    ]


def step_weight_bytes(config: ModelConfig, form: Format, uses: Sequence[MlpUse], *, head_rows: float) -> float:
    """Weights that one step of the CPU engine reads. head_rows: rows of the head whose logits are exact."""
    hidden = config.hidden_size
    vectors = sum(tensor.num_bytes for tensor in layer_tensors(config, form, 0) if tensor.dtype == "F32")
    attention = 4 * hidden * row_bytes(form.attention, hidden)
    mlp = sum(mlp_bytes(config, form, use) for use in uses)
    return config.num_layers * (vectors + attention) + mlp + head_bytes(config, form, head_rows)


def mlp_bytes(config: ModelConfig, form: Format, use: MlpUse) -> float:
    """The matrices of one MLP."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    if form.mlp == "planes":
        rest, down = row_bytes("rest", hidden), row_bytes("int8", hidden)
        return neurons * hot_bytes(config) + use.candidates * rest + use.active * down
    up: float = neurons * row_bytes(form.mlp, hidden)
    if not form.packed and use.candidates < neurons:
        up = neurons * sketch_row_bytes(hidden, UP_BITS) + use.candidates * row_bytes(form.mlp, hidden)
    if form.mlp == "q4":
        scales, row = record_parts(hidden)
        return up + use.active * row + use.groups * scales
    return up + use.active * row_bytes("int8" if form.mlp == "q8" else form.mlp, hidden)


def head_bytes(config: ModelConfig, form: Format, exact_rows: float) -> float:
    """Final norm and head, and one row of the embedding."""
    hidden, rows = config.hidden_size, config.vocab_size
    if form.head == "planes":
        top, rest = top_bytes(hidden), row_bytes("rest", hidden)
        # Rows are refined once all are estimated, so that their top rows are read twice.
        again = top if exact_rows < rows else 0
        matrix = rows * top + exact_rows * (again + rest)
    elif exact_rows < rows:
        matrix = rows * sketch_row_bytes(hidden, HEAD_BITS) + exact_rows * row_bytes(form.head, hidden)
    else:
        matrix = rows * row_bytes(form.head, hidden)
    embedding = hidden * (_FLOAT_BYTES if form.name == "float32" else 2)
    return matrix + 2 * hidden * _FLOAT_BYTES + embedding


@dataclass(frozen=True)
class Traffic:
    """Bytes per decoded token."""

    read: float
    """What was read; with a batch the most that can have been (see in_batch)."""
    dense: float
    """What a dense engine of the same format reads for it."""


def token_traffic(
    config: ModelConfig,
    weight_format: str,
    kv_dtype: str,
    *,
    attended: float,
    batch: int = 1,
    counts: Sequence[Mapping[str, float]] | None = None,
    head_rows: float | None = None,
) -> Traffic:
    """Weights and cache of one token of a step of `batch` sequences that each attend to `attended` tokens.

    counts: the CPU engine's; None for an engine that counts nothing, and then everything is read. head_rows: rows of
    the vocabulary head whose logits were computed exactly; None is all of them.
    """
    if counts is None and weight_format in accounting.WEIGHT_BITS:
        weights = accounting.weight_bytes_per_token(config, weight_format)
        cache = attended * accounting.kv_bytes_per_token(config, kv_dtype)
        return Traffic(weights / batch + cache, weights / batch + cache)
    form = FORMATS[weight_format]
    cache = attended * kv_bytes_per_token(config, kv_dtype)
    counted = all_neurons(config) if counts is None else counted_neurons(counts, config)
    uses = in_batch(counted, batch, config)
    rows = config.vocab_size if head_rows is None else min(config.vocab_size, batch * head_rows)
    read = step_weight_bytes(config, form, uses, head_rows=rows)
    dense = step_weight_bytes(config, form, all_neurons(config), head_rows=config.vocab_size)
    return Traffic(read / batch + cache, dense / batch + cache)


QUERY_TILE = 32
"""Queries that share the keys and values of the CPU engine's attention (native/kernels.h: kQueryTile)."""


def prompt_bytes(config: ModelConfig, weight_format: str, kv_dtype: str, tokens: int, step: int) -> float:
    """Bytes that reading a prompt moves: the blocks' weights once a step of `step` tokens, the head once."""
    form, rows = FORMATS[weight_format], config.vocab_size
    head = head_bytes(config, form, rows)
    blocks = step_weight_bytes(config, form, all_neurons(config), head_rows=rows) - head
    cache = tokens * (tokens + 1) / 2 / QUERY_TILE * accounting.kv_bytes_per_token(config, kv_dtype)
    return -(-tokens // step) * blocks + head + cache


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of reading a prompt: every matrix of the blocks for every token, the head once, causal attention."""
    count = accounting.count_parameters(config)
    blocks = count.attention + count.mlp
    return 2 * blocks * tokens + 2 * count.head + 2 * tokens * tokens * config.hidden_size * config.num_layers
