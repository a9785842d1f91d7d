"""How much memory a model will take, said before it is loaded instead of by the kernel's killer. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from persimmon.config import ModelConfig
from persimmon.errors import UnavailableError
from persimmon.fast.cpu.formats import HEAD_BITS, UP_BITS, Format, sketch_bytes
from persimmon.fast.cpu.packed import planned_bytes
from persimmon.machine import memory_available

GIB = 1 << 30

STEP_TOKENS = 256
"""Tokens that run through all layers together (native/model.cpp: kStepTokens)."""

_MOST_SKETCH_BYTES, _MOST_SKETCH_INPUTS, _FEWEST_RANKED = 64 << 20, 16_384, 4_097
"""Models whose sketches would be larger have none, smaller heads have none (native/model.cpp: make_sketches)."""

_BASE_BYTES = 300_000_000  # Python, numpy, PyTorch and the tokenizer


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes with a context."""

    weights: int
    """Resident, or mapped and then so once used. The embedding counts only by its rows in use."""
    keys_and_values: int
    """Of `context` tokens."""
    scratch: int
    """Activations, sketches of a small unquantized model, and Python itself."""
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.keys_and_values + self.scratch

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.total / GIB:.1f} GiB: weights {self.weights / GIB:.1f}, keys and values of {self.context} tokens "
            f"{self.keys_and_values / GIB:.1f}, scratch {self.scratch / GIB:.1f}"
        )


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of the keys and values of a token in all layers; int8 has a float32 scale per head and matrix."""
    per_head = config.head_dim + 4 if kv_dtype == "int8" else 4 * config.head_dim
    return 2 * config.num_layers * config.num_heads * per_head


def plan_memory(config: ModelConfig, form: Format, kv_dtype: str, context: int) -> MemoryPlan:
    """What a model needs with sequences of `context` tokens in all."""
    embedding = "F32" if form.name == "float32" else "BF16"
    rows = config.vocab_size * config.hidden_size * (4 if embedding == "F32" else 2)
    per_token = 4 * (5 * config.hidden_size + 2 * config.intermediate_size)
    scratch = _BASE_BYTES + STEP_TOKENS * per_token + 8 * config.vocab_size + planned_sketch_bytes(config, form)
    weights = planned_bytes(config, form, embedding) - rows
    return MemoryPlan(weights, context * kv_bytes_per_token(config, kv_dtype), scratch, context)


def planned_sketch_bytes(config: ModelConfig, form: Format) -> int:
    """Bytes of the rough copies of up projections and head that small unquantized models keep besides."""
    hidden = config.hidden_size
    size = config.num_layers * sketch_bytes(config.intermediate_size, hidden, UP_BITS)
    if config.vocab_size >= _FEWEST_RANKED:
        size += sketch_bytes(config.vocab_size, hidden, HEAD_BITS)
    return 0 if form.packed or size > _MOST_SKETCH_BYTES or hidden > _MOST_SKETCH_INPUTS else size


def check_memory(plan: MemoryPlan, available: int | None = None) -> None:
    """Raise UnavailableError that says what is missing when the plan does not fit the free memory."""
    available = memory_available() if available is None else available
    if available is not None and plan.total > available:
        raise UnavailableError(
            f"not enough memory: {plan.describe()}; {available / GIB:.1f} GiB are free, "
            f"{(plan.total - available) / GIB:.1f} GiB are missing"
        )
