"""The packed formats: which tensors a model has in each, their names, types and shapes. No torch.

    q8    every matrix int8 in groups of 32; the down projection neuron-major, so that zeros skip its rows
    q4    every matrix int4 in groups of 32; the down projection neuron-major, so that zeros skip its rows
    p44   the MLP int8, its up projection in planes with 16 outlier columns exact, attention int4
    all   head int8 in planes, so that all but the largest logits need only the first; the embedding as it was

Planes: the top two bits of a row's int8 weights lie in its `top` row, with their scales, the other six in its `rest`
row. Top rows are read for every neuron and every word of the vocabulary, rest rows where they are needed.

The byte layouts are in native/layout.h. Unpacked checkpoints run as `bfloat16` or `float32` with the same tensor names
and plain matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from persimmon.config import ModelConfig
from persimmon.errors import InputError

GROUP = 32
"""Weights that share a scale: a float16, or in planes a byte times the row's unit."""

SUPERBLOCK = 256
"""Rows are padded with zeros to a multiple of this."""

OUTLIERS = 16
"""Input columns of a p44 up projection that are kept in float16."""

_ITEM_BYTES = {"U8": 1, "I32": 4, "F32": 4, "BF16": 2}

# Bytes of a superblock of 256 weights (native/layout.h).
_SUPERBLOCK_BYTES = {"float32": 1024, "bfloat16": 512, "q8": 272, "q4": 144, "rest": 192, "int8": 272}

# Of a top row (native/layout.h): codes and scales of a superblock, what follows them, and what all is padded to.
_TOP_CODE_BYTES, _TOP_SCALE_BYTES, _TOP_FACTS_BYTES, _LINE_BYTES = 64, 8, 48, 64


@dataclass(frozen=True)
class Format:
    """How the kinds of matrices are stored; the words are those of the native module."""

    name: str
    attention: str
    mlp: str
    head: str
    layout: int = 1
    """Version of the packed layout; a directory of another one is refused."""

    @property
    def packed(self) -> bool:
        """Whether it is one of the quantized formats."""
        return self.head == "planes"


FORMATS = {
    # Planes were 4 and 4 bits with float16 scales in q8 1, q4 2 and p44 1; q4 1 had a dense down projection besides.
    "q8": Format("q8", "q8", "q8", "planes", layout=2),
    "q4": Format("q4", "q4", "q4", "planes", layout=3),
    "p44": Format("p44", "q4", "planes", "planes", layout=2),
    "bfloat16": Format("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    "float32": Format("float32", "float32", "float32", "float32"),
}
PACKED_FORMATS = tuple(name for name, f in FORMATS.items() if f.packed)


def packed_format(name: str) -> Format:
    """A quantized format by name; InputError for another word."""
    if name not in PACKED_FORMATS:
        raise InputError(f"format must be one of {', '.join(PACKED_FORMATS)}, got {name!r}")
    return FORMATS[name]


def why_unfit(config: ModelConfig) -> str | None:
    """None for a shape that the kernels can run, else why not."""
    if config.head_dim % 4 or config.head_dim > 256:
        return f"the cpu engine needs head_dim as a multiple of 4 up to 256, got {config.head_dim}"
    return None


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of a packed model."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def superblocks(inputs: int) -> int:
    """Superblocks of a row."""
    return -(-inputs // SUPERBLOCK)


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of a row of a kind of superblock."""
    return superblocks(inputs) * _SUPERBLOCK_BYTES[kind]


def top_bytes(inputs: int) -> int:
    """Bytes of the top row of planes: the top two bits of the weights, scales, outlier weights and four numbers."""
    used = superblocks(inputs) * (_TOP_CODE_BYTES + _TOP_SCALE_BYTES) + _TOP_FACTS_BYTES
    return -(-used // _LINE_BYTES) * _LINE_BYTES


def top_parts(inputs: int) -> tuple[int, int, int]:
    """Where in a top row its scales, its outlier weights and its unit begin."""
    scales = superblocks(inputs) * _TOP_CODE_BYTES
    outliers = scales + superblocks(inputs) * _TOP_SCALE_BYTES
    return scales, outliers, outliers + 2 * OUTLIERS


def record_parts(outputs: int) -> tuple[int, int]:
    """Bytes of the float16 scales of a q4 down record, one per output, and of each of its GROUP neurons' rows."""
    width = superblocks(outputs) * SUPERBLOCK
    return 2 * width, width // 2


def record_bytes(outputs: int) -> int:
    """Bytes of a q4 down record."""
    scales, row = record_parts(outputs)
    return scales + GROUP * row


UP_BITS, HEAD_BITS = 8, 5
"""Of the codes in the sketches of float matrices (native/layout.h)."""


def sketch_row_bytes(inputs: int, bits: int) -> int:
    """Bytes of a row in the sketch of a float matrix (native/layout.h): codes and five numbers of 4 bytes."""
    return -(-inputs // GROUP) * GROUP * bits // 8 + 5 * 4


def sketch_bytes(rows: int, inputs: int, bits: int) -> int:
    """Bytes of the sketch of a float matrix: blocks of 16 rows."""
    return -(-rows // 16) * 16 * sketch_row_bytes(inputs, bits)


def hot_bytes(config: ModelConfig) -> int:
    """Bytes of a p44 hot row: the top row of its up row."""
    return top_bytes(config.hidden_size)


def cold_bytes(config: ModelConfig) -> int:
    """Bytes of a p44 cold row: the rest row of its up row and the down row."""
    return row_bytes("rest", config.hidden_size) + row_bytes("int8", config.hidden_size)


def embedding_tensors(config: ModelConfig, dtype: str) -> list[PackedTensor]:
    """The embedding, BF16 or F32."""
    return [PackedTensor("embed_tokens.weight", dtype, (config.vocab_size, config.hidden_size))]


def head_tensors(config: ModelConfig, form: Format) -> list[PackedTensor]:
    """Final norm and vocabulary head."""
    rows, hidden = config.vocab_size, config.hidden_size
    if form.head == "planes":
        planes = [("top", top_bytes(hidden)), ("rest", row_bytes("rest", hidden))]
    else:
        planes = [("weight", row_bytes(form.head, hidden))]
    head = [PackedTensor(f"lm_head.{name}", "U8", (rows, size)) for name, size in planes]
    return [*head, *_vectors("final_layernorm", hidden)]


def layer_tensors(config: ModelConfig, form: Format, layer: int) -> list[PackedTensor]:
    """One decoder layer: large tensors first, so that they stay aligned."""
    hidden, neurons, prefix = config.hidden_size, config.intermediate_size, f"layers.{layer}."
    attention = prefix + "self_attn."
    tensors = _mlp_tensors(config, form, prefix + "mlp.")
    tensors += [
        PackedTensor(attention + "query_key_value.weight", "U8", (3 * hidden, row_bytes(form.attention, hidden))),
        PackedTensor(attention + "dense.weight", "U8", (hidden, row_bytes(form.attention, hidden))),
        PackedTensor(attention + "query_key_value.bias", "F32", (3 * hidden,)),
        PackedTensor(attention + "dense.bias", "F32", (hidden,)),
        PackedTensor(prefix + "mlp.dense_h_to_4h.bias", "F32", (neurons,)),
        PackedTensor(prefix + "mlp.dense_4h_to_h.bias", "F32", (hidden,)),
        *_vectors(prefix + "input_layernorm", hidden),
        *_vectors(prefix + "post_attention_layernorm", hidden),
    ]
    if config.qk_layernorm:
        tensors += _vectors(attention + "q_layernorm", config.head_dim)
        tensors += _vectors(attention + "k_layernorm", config.head_dim)
    return tensors


def _mlp_tensors(config: ModelConfig, form: Format, prefix: str) -> list[PackedTensor]:
    hidden, neurons = config.hidden_size, config.intermediate_size
    if form.mlp == "planes":
        return [
            PackedTensor(prefix + "hot", "U8", (neurons, hot_bytes(config))),
            PackedTensor(prefix + "cold", "U8", (neurons, cold_bytes(config))),
            PackedTensor(prefix + "outlier_columns", "I32", (OUTLIERS,)),
        ]
    up = PackedTensor(prefix + "dense_h_to_4h.weight", "U8", (neurons, row_bytes(form.mlp, hidden)))
    if form.mlp == "q4":
        return [up, PackedTensor(prefix + "dense_4h_to_h.records", "U8", (-(-neurons // GROUP), record_bytes(hidden)))]
    kind = "int8" if form.mlp == "q8" else form.mlp
    return [up, PackedTensor(prefix + "dense_4h_to_h.neurons", "U8", (neurons, row_bytes(kind, hidden)))]


def _vectors(name: str, size: int) -> list[PackedTensor]:
    return [PackedTensor(f"{name}.{part}", "F32", (size,)) for part in ("weight", "bias")]
