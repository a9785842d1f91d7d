"""What a Persimmon costs: parameters, operations, bytes per token, memory. Arithmetic only, no torch.

Every number follows from the configuration; the tests hold them to the 8B's in the literature. Units are in the names:
bytes are bytes, a multiplication with its addition counts as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persimmon.config import ModelConfig
from persimmon.errors import InputError

WEIGHT_BITS = {"float32": 32.0, "bfloat16": 16.0, "q8": 8.5, "q4": 4.5}
"""Bits per weight of a matrix. Quantized formats spend one 16-bit scale on every 32 weights."""

_SHARED_SCALE = {"q4": (32, 0.5)}
"""Neurons whose down weights share scales, and the bits per weight of those: read when one of the neurons is active."""

_VECTOR_BITS = {"float32": 32.0}  # biases and norms; 16 bits in every other format

KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes per number in the cache. int8 has a float32 scale per head, token, and key or value on top."""

_KV_SCALE_BYTES = {"int8": 4}

PUBLISHED_ACTIVE_SHARE = 0.10
"""Adept's statement on the 8B: about 90 % of the MLP's neurons are zero for a token."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part; `matrices` and `vectors` split the same total by shape."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int
    vectors: int
    """Biases and norms, which are in the parts above as well."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.attention + self.mlp + self.norms + self.head

    @property
    def read_per_token(self) -> int:
        """Those that one decoded token needs when nothing is skipped: all but the embedding, of which one row."""
        return self.total - self.embedding


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model."""
    hidden, width, layers = config.hidden_size, config.intermediate_size, config.num_layers
    norms = layers * (4 * hidden + (4 * config.head_dim if config.qk_layernorm else 0)) + 2 * hidden
    biases = layers * (3 * hidden + hidden + width + hidden)
    return ParameterCount(
        embedding=config.vocab_size * hidden,
        attention=layers * (4 * hidden * hidden + 4 * hidden),
        mlp=layers * (2 * hidden * width + width + hidden),
        norms=norms,
        head=config.vocab_size * hidden,
        vectors=norms + biases,
    )


def training_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of forward and backward per token of a causal sequence of `context` tokens.

    Six per parameter that is multiplied, and the attention products: 2 * context * hidden forward per layer (the causal
    half of two products), three times that with the backward pass. Recomputation is not counted.
    """
    return 6 * count_parameters(config).read_per_token + 6 * context * config.hidden_size * config.num_layers


def decoding_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of one decoded token that attends to `context` tokens, nothing skipped."""
    return 2 * count_parameters(config).read_per_token + 4 * context * config.hidden_size * config.num_layers


def weight_bytes(config: ModelConfig, weight_format: str) -> int:
    """Bytes of all weights."""
    count = count_parameters(config)
    return _stored_bytes(count.total, count.vectors, weight_format)


def weight_bytes_per_token(config: ModelConfig, weight_format: str, *, active: float = 1.0, skip: str = "none") -> int:
    """Bytes of weights that one decoded token reads at batch size 1.

    active: share of the MLP's neurons that are not zero. skip: `none`, `down` (only the second projection's inactive
    rows are skipped, which is exact) or `both` (the first one's too, which needs a predictor). Neurons are taken as
    independent where several share scales.
    """
    if not 0.0 <= active <= 1.0:
        raise InputError(f"active must be a share from 0 to 1, got {active}")
    skipped_matrices = {"none": 0, "down": 1, "both": 2}
    if skip not in skipped_matrices:
        raise InputError(f"skip must be one of {', '.join(skipped_matrices)}, got {skip!r}")
    count = count_parameters(config)
    matrix = config.num_layers * config.hidden_size * config.intermediate_size
    skipped = round(skipped_matrices[skip] * matrix * (1.0 - active))
    row = config.hidden_size  # of the embedding
    read = _stored_bytes(count.read_per_token + row - skipped, count.vectors, weight_format)
    if skip != "none" and weight_format in _SHARED_SCALE:
        neurons, bits = _SHARED_SCALE[weight_format]
        read += round(matrix * bits / 8 * ((1.0 - active) - (1.0 - active) ** neurons))
    return read


def _stored_bytes(parameters: int, vectors: int, weight_format: str) -> int:
    bits = _choice("weight format", weight_format, WEIGHT_BITS)
    return round(((parameters - vectors) * bits + vectors * _VECTOR_BITS.get(weight_format, 16.0)) / 8)


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes that one token adds to the cache: a key and a value per layer."""
    item = int(_choice("KV dtype", kv_dtype, KV_BYTES))
    scales = config.num_heads * _KV_SCALE_BYTES.get(kv_dtype, 0)
    return 2 * config.num_layers * (config.hidden_size * item + scales)


def logit_bytes_per_position(config: ModelConfig) -> int:
    """Bytes of one position's float32 logits."""
    return 4 * config.vocab_size


def _choice(what: str, name: str, table: Mapping[str, float]) -> float:
    if name not in table:
        raise InputError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


@dataclass(frozen=True)
class MemoryPlan:
    """What one sequence of `context` tokens needs while decoding; activations are small beside it."""

    context: int
    weight_format: str
    kv_dtype: str
    weight_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.kv_bytes


def plan_memory(config: ModelConfig, context: int, weight_format: str, kv_dtype: str) -> MemoryPlan:
    """Memory of decoding one sequence. Raises InputError for a context that the model does not have."""
    config.check_context(context)
    weights = weight_bytes(config, weight_format)
    return MemoryPlan(context, weight_format, kv_dtype, weights, context * kv_bytes_per_token(config, kv_dtype))
