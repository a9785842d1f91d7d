"""What a model takes on a GPU, and which format, cache type and context a card of a given size can run. No torch.

Bytes are those of the kernels' layouts (layouts.py), the pool (pool.py) and one pass (network.py), so that a model that
does not fit is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persimmon.accounting import count_parameters, kv_bytes_per_token
from persimmon.config import ModelConfig
from persimmon.errors import InputError, UnavailableError

GIB = 1 << 30

USABLE = 0.97
"""Share of the GiB printed on a card that the driver gives out: it and error correction keep the rest. An estimate;
with a card at hand, loading asks the driver."""

CARDS = {f"{size} GB": int(USABLE * size * GIB) for size in (80, 40, 24, 16, 12)}
"""What common cards have."""

RESERVE_BYTES = GIB // 2
"""CUDA context, loaded kernels, the libraries' workspaces and what the allocator leaves unused. An estimate."""

GATHER_BYTES = 32 << 20
"""Most bytes of keys, and again of values, that a prompt's attention gathers at a time: a group of heads."""

DECODE_ROWS = 64
"""Rows of the largest batch that is captured (graphs.py)."""

MOST_PARTS = 8
"""Ranges that a product of a full batch is split into: each leaves a partial sum of every row."""

LOGIT_ROWS = 16
"""Positions whose logits exist at a time."""

LEAST_CONTEXT = 512
"""Tokens that must fit for loading to make sense."""

_CONTEXT_STEP = 512

PREFERENCE = (("bfloat16", "bfloat16"), ("q8", "bfloat16"), ("q8", "int8"), ("q4", "int8"))
"""Weights and cache, the most exact first. fp8 and p44 are chosen by name: they save nothing over q8 in memory."""

_KV_ORDER = {"float32": ("float32", "bfloat16", "int8")}
"""`auto` cache types by weight format, the most exact first ..."""
_KV_DEFAULT = ("bfloat16", "int8")
"""... and of all others."""


def _matrix_bytes(weight_format: str, outputs: int, inputs: int) -> int:
    """One matrix; quantized rows are padded to whole groups."""
    if weight_format == "float32":
        return 4 * outputs * inputs
    if weight_format == "bfloat16":
        return 2 * outputs * inputs
    if weight_format == "fp8":
        return outputs * inputs + 4 * outputs
    groups = -(-inputs // 32)
    return outputs * groups * ((32 if weight_format == "q8" else 16) + 2)


def device_weight_bytes(config: ModelConfig, weight_format: str) -> int:
    """All weights as they lie on the device: matrices, embedding, vectors in float32, rotary tables."""
    hidden, neurons, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    packed = weight_format in ("q8", "q4", "p44")
    attention = "q4" if weight_format == "p44" else weight_format
    layer = _matrix_bytes(attention, 3 * hidden, hidden) + _matrix_bytes(attention, hidden, hidden)
    if weight_format == "p44":  # two planes with one set of scales, 16 float16 outliers a neuron; int8 down rows
        planes = 2 * _matrix_bytes("q4", neurons, hidden) - neurons * (-(-hidden // 32) * 2)
        layer += planes + 32 * neurons + _matrix_bytes("q8", neurons, hidden)
    else:
        layer += _matrix_bytes(weight_format, neurons, hidden)  # the down projection is neuron-major but for q4
        layer += _matrix_bytes(weight_format, *((hidden, neurons) if weight_format == "q4" else (neurons, hidden)))
    head = _matrix_bytes("q8" if packed else weight_format, rows, hidden)
    embedding = rows * hidden * (4 if weight_format == "float32" else 2)
    tables = 4 * config.max_positions * config.rotary_dim
    return config.num_layers * layer + head + embedding + 4 * count_parameters(config).vectors + tables


def device_kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return kv_bytes_per_token(config, "int8" if kv_dtype == "fp8" else kv_dtype)


def scratch_bytes(config: ModelConfig, weight_format: str, context: int, pass_tokens: int) -> int:
    """What runs beside weights and cache: a prompt's pass at its peak, and the captured batches with their logits.

    A pass holds gathered keys and values while it attends, an unpacked matrix while it multiplies, never both.
    """
    item = 4 if weight_format == "float32" else 2
    hidden, neurons = config.hidden_size, config.intermediate_size
    # The stream and partial sums in float32; normed, fused, queries, attention in the activations' type, or the MLP's.
    attention = (2 * 4 + (1 + 3 + 1 + 1) * item) * hidden
    mlp = (2 * 4 + 2 * item) * hidden + 2 * item * neurons
    unpacked = item * hidden * neurons if weight_format in ("q8", "q4", "p44", "fp8") else 0
    gathered = 2 * min(GATHER_BYTES, context * hidden * item)
    tokens = min(pass_tokens, context)
    drawn = 2 * 4 * DECODE_ROWS * config.vocab_size  # rows of a pass that draw, as many at a time
    in_pass = max(tokens * attention + gathered, tokens * mlp + unpacked, drawn)
    # Logits in the buckets' common buffer, and in the graphs' memory the head's result or the sampler's exponentials.
    decoding = 2 * 4 * DECODE_ROWS * config.vocab_size + DECODE_ROWS * (max(attention, mlp) + MOST_PARTS * 4 * hidden)
    return in_pass + decoding


@dataclass(frozen=True)
class GpuPlan:
    """How a model runs on a card, in bytes, and why."""

    weight_format: str
    kv_dtype: str
    context: int
    sequences: int
    """Sequences of the whole context whose keys and values fit."""
    pass_tokens: int
    """Tokens of a prompt that run at a time."""
    weights: int
    keys_and_values: int
    """Of one sequence."""
    scratch: int
    memory: int
    """What the card has, or has free."""
    reserve: int
    reason: str

    @property
    def total(self) -> int:
        """What one sequence of the whole context takes, reserve included."""
        return self.weights + self.keys_and_values + self.scratch + self.reserve


def plan(
    config: ModelConfig, weight_format: str, kv_dtype: str, context: int, memory: int, reserve: int = RESERVE_BYTES
) -> GpuPlan:
    """The arithmetic of one choice, whether it fits or not. A small card reads prompts in smaller passes."""
    if not 1 <= context <= config.max_positions:
        raise InputError(f"context must be from 1 to {config.max_positions}, got {context}")
    pass_tokens = 2_048 if memory >= 20 * GIB else 512
    weights = device_weight_bytes(config, weight_format)
    cache = (context + 64) * device_kv_bytes_per_token(config, kv_dtype)  # one block of padding
    scratch = scratch_bytes(config, weight_format, context, pass_tokens)
    sequences = max(0, (memory - reserve - weights - scratch) // cache)
    return GpuPlan(
        weight_format, kv_dtype, context, sequences, pass_tokens, weights, cache, scratch, memory, reserve, ""
    )


def choose(
    config: ModelConfig, memory: int, *, formats: Sequence[str] | None = None, kv_dtype: str = "auto",
    context: int | None = None, reserve: int = RESERVE_BYTES,
) -> GpuPlan:  # fmt: skip
    """The most exact choice that fits: first weights, then keys and values, and only then a shorter context.

    formats: what the weights are, or may be turned into; default those of PREFERENCE. context: None is the model's, cut
    where it cannot fit; a number is kept. Raises UnavailableError that says what is missing.
    """
    wanted = context or config.max_positions
    options = _options(formats, kv_dtype)
    plans = [plan(config, weights, kv, wanted, memory, reserve) for weights, kv in options]
    for number, fitting in enumerate(plans):
        if fitting.sequences:
            return _because(fitting, _why_not_before(plans[:number]))
    smallest = min(plans, key=lambda p: p.total)
    if context is None:
        for shorter in range(wanted - wanted % _CONTEXT_STEP or wanted, LEAST_CONTEXT - 1, -_CONTEXT_STEP):
            cut = plan(config, smallest.weight_format, smallest.kv_dtype, shorter, memory, reserve)
            if cut.sequences:
                return _because(cut, f"{wanted} positions would take {_gib(smallest.total)}")
    raise UnavailableError(
        f"the model does not fit: {describe(smallest)}; the GPU has {_gib(memory)}, "
        f"{_gib(smallest.total - memory)} are missing. {_remedy(smallest)}"
    )


def _options(formats: Sequence[str] | None, kv_dtype: str) -> list[tuple[str, str]]:
    """(weights, cache) in the order of preference."""
    if formats is None:
        return [(w, kv if kv_dtype == "auto" else kv_dtype) for w, kv in PREFERENCE]
    return [
        (weights, kv)
        for weights in formats
        for kv in (_KV_ORDER.get(weights, _KV_DEFAULT) if kv_dtype == "auto" else (kv_dtype,))
    ]


def _because(chosen: GpuPlan, reason: str) -> GpuPlan:
    """The plan with its reason."""
    return GpuPlan(**{**chosen.__dict__, "reason": reason})


def _why_not_before(refused: Sequence[GpuPlan]) -> str:
    if not refused:
        return "the most exact format fits"
    last = refused[-1]
    return f"{last.weight_format} with {last.kv_dtype} keys and values would take {_gib(last.total)}"


def describe(chosen: GpuPlan) -> str:
    """One line."""
    return (
        f"{_gib(chosen.total)} for {chosen.weight_format} weights {_gib(chosen.weights)}, {chosen.kv_dtype} keys and "
        f"values of {chosen.context} tokens {_gib(chosen.keys_and_values)}, scratch {_gib(chosen.scratch)}, "
        f"reserve {_gib(chosen.reserve)}"
    )


def _remedy(smallest: GpuPlan) -> str:
    if smallest.weight_format in ("float32", "bfloat16", "fp8", "q8", "p44"):
        return "Quantize to q4, or use a shorter --context"
    return "Use a shorter --context, or prune the vocabulary"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
