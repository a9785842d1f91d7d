"""Every tensor of a Persimmon checkpoint: its name here, on the hub and in Adept's release, and its shape.

`TABLE` is the only place where these names are written; all translations are derived from it and know no other name.
`{}` stands for the layer number. Shapes are written in the letters of `model.py`:
V vocab_size, H hidden_size, F intermediate_size, D head_dim, and Q = 3 * hidden_size for the fused projection.

Sources: transformers `models/persimmon/modeling_persimmon.py` for the hub's names; adept-inference `megatron/model/`
and transformers' `convert_persimmon_weights_to_hf.py` for the release's, whose nested dictionaries are joined by dots.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from persimmon.config import ModelConfig


class TensorNames(NamedTuple):
    """One row of the table. The QK LayerNorms, which a configuration may lack, are the rows of shape D."""

    ours: str
    hub: str
    adept: str
    shape: str


# fmt: off
TABLE = (
    TensorNames("embed_tokens.weight", "model.embed_tokens.weight",
                "language_model.embedding.word_embeddings.weight", "VH"),
    TensorNames("layers.{}.input_layernorm.weight", "model.layers.{}.input_layernorm.weight",
                "language_model.encoder.layers.{}.input_layernorm.weight", "H"),
    TensorNames("layers.{}.input_layernorm.bias", "model.layers.{}.input_layernorm.bias",
                "language_model.encoder.layers.{}.input_layernorm.bias", "H"),
    TensorNames("layers.{}.self_attn.query_key_value.weight", "model.layers.{}.self_attn.query_key_value.weight",
                "language_model.encoder.layers.{}.self_attention.query_key_value.weight", "QH"),
    TensorNames("layers.{}.self_attn.query_key_value.bias", "model.layers.{}.self_attn.query_key_value.bias",
                "language_model.encoder.layers.{}.self_attention.query_key_value.bias", "Q"),
    TensorNames("layers.{}.self_attn.dense.weight", "model.layers.{}.self_attn.dense.weight",
                "language_model.encoder.layers.{}.self_attention.dense.weight", "HH"),
    TensorNames("layers.{}.self_attn.dense.bias", "model.layers.{}.self_attn.dense.bias",
                "language_model.encoder.layers.{}.self_attention.dense.bias", "H"),
    TensorNames("layers.{}.self_attn.q_layernorm.weight", "model.layers.{}.self_attn.q_layernorm.weight",
                "language_model.encoder.layers.{}.self_attention.q_layernorm.weight", "D"),
    TensorNames("layers.{}.self_attn.q_layernorm.bias", "model.layers.{}.self_attn.q_layernorm.bias",
                "language_model.encoder.layers.{}.self_attention.q_layernorm.bias", "D"),
    TensorNames("layers.{}.self_attn.k_layernorm.weight", "model.layers.{}.self_attn.k_layernorm.weight",
                "language_model.encoder.layers.{}.self_attention.k_layernorm.weight", "D"),
    TensorNames("layers.{}.self_attn.k_layernorm.bias", "model.layers.{}.self_attn.k_layernorm.bias",
                "language_model.encoder.layers.{}.self_attention.k_layernorm.bias", "D"),
    TensorNames("layers.{}.post_attention_layernorm.weight", "model.layers.{}.post_attention_layernorm.weight",
                "language_model.encoder.layers.{}.post_attention_layernorm.weight", "H"),
    TensorNames("layers.{}.post_attention_layernorm.bias", "model.layers.{}.post_attention_layernorm.bias",
                "language_model.encoder.layers.{}.post_attention_layernorm.bias", "H"),
    TensorNames("layers.{}.mlp.dense_h_to_4h.weight", "model.layers.{}.mlp.dense_h_to_4h.weight",
                "language_model.encoder.layers.{}.mlp.dense_h_to_4h.weight", "FH"),
    TensorNames("layers.{}.mlp.dense_h_to_4h.bias", "model.layers.{}.mlp.dense_h_to_4h.bias",
                "language_model.encoder.layers.{}.mlp.dense_h_to_4h.bias", "F"),
    TensorNames("layers.{}.mlp.dense_4h_to_h.weight", "model.layers.{}.mlp.dense_4h_to_h.weight",
                "language_model.encoder.layers.{}.mlp.dense_4h_to_h.weight", "HF"),
    TensorNames("layers.{}.mlp.dense_4h_to_h.bias", "model.layers.{}.mlp.dense_4h_to_h.bias",
                "language_model.encoder.layers.{}.mlp.dense_4h_to_h.bias", "H"),
    TensorNames("final_layernorm.weight", "model.final_layernorm.weight",
                "language_model.encoder.final_layernorm.weight", "H"),
    TensorNames("final_layernorm.bias", "model.final_layernorm.bias",
                "language_model.encoder.final_layernorm.bias", "H"),
    TensorNames("lm_head.weight", "lm_head.weight", "word_embeddings_for_head.weight", "VH"),
)
# fmt: on

_ROWS = {line.ours: line for line in TABLE}

# A buffer that both formats may carry and that is computed anew: the frequencies of the rotary positions.
_INV_FREQ = re.compile(
    r"(model\.layers\.[0-9]+\.self_attn|language_model\.encoder\.layers\.[0-9]+\.self_attention)\.rotary_emb\.inv_freq"
)


class Parameter(NamedTuple):
    """One tensor of one model: its three names and its shape."""

    ours: str
    hub: str
    adept: str
    shape: tuple[int, ...]


def row(ours: str) -> TensorNames:
    """The row of one of our names, with `{}` for the layer."""
    return _ROWS[ours]


def is_inverse_frequency(name: str) -> bool:
    """Whether `name` is a `rotary_emb.inv_freq` buffer, which says nothing that the configuration does not."""
    return _INV_FREQ.fullmatch(name) is not None


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the model's order."""
    sizes = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "F": config.intermediate_size,
        "D": config.head_dim,
        "Q": 3 * config.hidden_size,
    }
    rows = [line for line in TABLE if config.qk_layernorm or line.shape != "D"]
    layered = [line for line in rows if "{}" in line.ours]
    first, last = rows.index(layered[0]), rows.index(layered[-1]) + 1

    def fill(line: TensorNames, layer: int | str) -> Parameter:
        shape = tuple(sizes[letter] for letter in line.shape)
        return Parameter(line.ours.format(layer), line.hub.format(layer), line.adept.format(layer), shape)

    inside = [fill(line, layer) for layer in range(config.num_layers) for line in layered]
    return [fill(line, "") for line in rows[:first]] + inside + [fill(line, "") for line in rows[last:]]
