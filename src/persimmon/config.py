"""The shape of a Persimmon model: one frozen dataclass, named presets, and the `config.json` it maps to.

Nothing here imports torch, so that reading a configuration costs milliseconds.

Source of the released numbers: the `config.json` of `adept/persimmon-8b-base` (revision 94dc4e0b) and the
argument parser of `persimmon-ai-labs/adept-inference`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persimmon.errors import ConfigError, InputError

ROTARY_PRECISIONS = ("float32", "bfloat16")

_TYPE_WORDS: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}

# Fields that a hub `config.json` spells differently.
_HUB_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "rotary_precision": "persimmon_rotary_precision",
}
_REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")

# Keys that a hub `config.json` may carry and that say nothing about the mathematics. `rms_norm_eps` is a stray key
# of old files: every norm of Persimmon is a LayerNorm. The last lines are what older transformers wrote for any model.
_IGNORED_HUB_KEYS = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map dtype initializer_range model_type pad_token_id rms_norm_eps
    torch_dtype transformers_version use_cache
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    typical_p use_bfloat16
    """.split()  # noqa: SIM905 - a list literal would take 70 lines
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the mathematics of a Persimmon decoder. Defaults are the released 8B."""

    vocab_size: int = 262_144
    """Rows of the embedding and of the head (about 192k are used by the released tokenizer)."""

    hidden_size: int = 4_096
    """Width of the residual stream."""

    intermediate_size: int = 16_384
    """Neurons of one MLP layer."""

    num_layers: int = 36
    """Decoder blocks."""

    num_heads: int = 64
    """Attention heads; every head has its own keys and values."""

    max_positions: int = 16_384
    """Context length in tokens."""

    rotary_base: float = 25_000.0
    """Base of the rotary frequencies (`rotary_emb_base` in the release, raised for 16k positions)."""

    partial_rotary_factor: float = 0.5
    """Share of each head's dimensions that rotates; the rest carries no position."""

    qk_layernorm: bool = True
    """LayerNorm with bias over head_dim on every query and key head, before rotary."""

    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""

    rotary_precision: str = "float32"
    """`float32` as every port, or `bfloat16` as the release computed its position tables."""

    bos_token_id: int = 71_013
    """`|ENDOFTEXT|` opens a document ..."""

    eos_token_id: int = 71_013
    """... and closes it."""

    hidden_dropout: float = 0.0
    """Metadata only: the released file says 0.6, which no code here ever applies."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise ConfigError(f"layer_norm_eps must be in (0, 1), got {self.layer_norm_eps!r}")
        if not 0.0 <= self.hidden_dropout < 1.0:
            raise ConfigError(f"hidden_dropout must be in [0, 1), got {self.hidden_dropout!r}")
        self._check_rotary()
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")

    def _check_types(self) -> None:
        """Every field has the type of its default; an integer will do for a number."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not kind:
                raise ConfigError(f"{field.name} must be {_TYPE_WORDS[kind]}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} must be finite, got {value!r}")

    def _check_rotary(self) -> None:
        if not 0.0 < self.partial_rotary_factor <= 1.0:
            raise ConfigError(f"partial_rotary_factor must be in (0, 1], got {self.partial_rotary_factor}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_dim = int(head_dim {self.head_dim} * partial_rotary_factor "
                f"{self.partial_rotary_factor}) = {self.rotary_dim} must be even and at least 2"
            )
        if self.rotary_precision not in ROTARY_PRECISIONS:
            raise ConfigError(
                f"rotary_precision must be one of {', '.join(ROTARY_PRECISIONS)}, got {self.rotary_precision!r}"
            )
        # The release's check that no frequency repeats inside the context
        # (adept-inference megatron/model/transformer.py): ceil(2 * length / pi) must not exceed the base.
        needed = math.ceil(2 * self.max_positions / math.pi)
        if needed > self.rotary_base:
            raise ConfigError(
                f"rotary_base {self.rotary_base:g} is too small for max_positions {self.max_positions}: "
                f"at least {needed} is needed"
            )

    def check_context(self, context: int | None) -> None:
        """Raise InputError for a longest sequence that the model has no positions for; None is the model's own."""
        if context is not None and not 1 <= context <= self.max_positions:
            raise InputError(f"context must be from 1 to the model's {self.max_positions} positions, got {context}")

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    # -- config.json ---------------------------------------------------------------------------------

    def to_hub(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` that transformers' PersimmonForCausalLM reads; every field is written out."""
        return {
            "architectures": ["PersimmonForCausalLM"],
            "model_type": "persimmon",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "hidden_act": "relu2",
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rotary_base,
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rotary_base,
                "partial_rotary_factor": self.partial_rotary_factor,
            },
            "qk_layernorm": self.qk_layernorm,
            "layer_norm_eps": self.layer_norm_eps,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": None,
            "torch_dtype": dtype,
            "persimmon_rotary_precision": self.rotary_precision,
        }

    @classmethod
    def from_hub(cls, data: Any) -> ModelConfig:
        """Read a hub `config.json`, old (`rope_theta`) or new (`rope_parameters`) form.

        Raises ConfigError for another architecture, a setting this implementation does not have, or an
        unknown key: never guesses.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config.json must hold an object, got {type(data).__name__}")
        if data.get("model_type") != "persimmon":
            raise ConfigError(f"model_type must be 'persimmon', got {data.get('model_type')!r}")
        rest = dict(data)
        nested = _rope_parameters(rest)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = _take(_HUB_NAMES.get(field.name, field.name), nested, rest)
            if field.name == "eos_token_id" and isinstance(value, list) and value:
                value = value[0]
            if value is not None:
                fields[field.name] = value
        missing = [_HUB_NAMES.get(name, name) for name in _REQUIRED_FIELDS if name not in fields]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        if "eos_token_id" in fields:  # one piece opens and closes documents
            fields.setdefault("bos_token_id", fields["eos_token_id"])
        _refuse_other_settings(rest, nested)
        return cls(**fields)


def _take(key: str, *sources: dict[str, Any]) -> Any:
    """Remove `key` from every source and return its one value, None when it is absent everywhere."""
    values = [source.pop(key) for source in sources if key in source]
    if any(value != values[0] for value in values):
        raise ConfigError(f"{key} is given twice with different values: {values}")
    return values[0] if values else None


def _rope_parameters(data: dict[str, Any]) -> dict[str, Any]:
    """Take the nested rope settings out of `data`; refuse scaling that would change the positions."""
    nested: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = data.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be an object, got {value!r}")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{key} type {kind!r} is not supported; only 'default'")
        nested.update({k: v for k, v in value.items() if k not in ("rope_type", "type")})
    return nested


def _refuse_other_settings(data: dict[str, Any], nested: dict[str, Any]) -> None:
    """Whatever is left must be the one value that Persimmon has, or be known to mean nothing."""
    fixed = {
        "hidden_act": ("relu2", "hidden_act must be 'relu2' (squared ReLU)"),
        "tie_word_embeddings": (False, "tie_word_embeddings must be false: the head has its own weights"),
    }
    for key, (expected, message) in fixed.items():
        value = data.pop(key, expected)
        if value != expected:
            raise ConfigError(f"{message}, got {value!r}")
    unknown = sorted((data.keys() - _IGNORED_HUB_KEYS) | nested.keys())
    if unknown:
        raise ConfigError(f"unknown config.json key: {', '.join(unknown)}")


def _small(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int) -> ModelConfig:
    """A shape of ours: MLP four times as wide as the stream; `|ENDOFTEXT|` follows the unknown piece."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        bos_token_id=1,
        eos_token_id=1,
    )


PRESETS: dict[str, ModelConfig] = {
    # A few thousand parameters: unit tests.
    "test": _small(vocab_size=320, hidden_size=16, num_layers=2, num_heads=2),
    # The shipped model: the largest that a 2-core CPU trains well in hours (docs/training.md).
    "mini": _small(vocab_size=8_192, hidden_size=256, num_layers=6, num_heads=4),
    "125m": _small(vocab_size=32_768, hidden_size=768, num_layers=12, num_heads=12),
    "1b": _small(vocab_size=65_536, hidden_size=2_048, num_layers=18, num_heads=32),
    # The release.
    "8b": ModelConfig(),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """A named preset, with some fields changed. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].replace(**changes)
