from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.config import PRESETS, ModelConfig, preset
from persimmon.errors import ConfigError

# As published in adept/persimmon-8b-base (old form: rope_theta at the top, stray keys, dropout of 0.6).
PUBLISHED = {
    "architectures": ["PersimmonForCausalLM"],
    "bos_token_id": 71013,
    "eos_token_id": 71013,
    "hidden_act": "relu2",
    "hidden_dropout": 0.6,
    "attention_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 16384,
    "model_type": "persimmon",
    "num_attention_heads": 64,
    "num_hidden_layers": 36,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 25000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}


def test_reads_the_published_configuration() -> None:
    assert ModelConfig.from_hub(PUBLISHED) == ModelConfig(hidden_dropout=0.6)


def test_dropout_is_metadata_and_never_written() -> None:
    assert ModelConfig(hidden_dropout=0.6).to_hub()["hidden_dropout"] == 0.0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_round_trip_through_json(name: str, precision: str) -> None:
    config = preset(name, rotary_precision=precision)
    assert ModelConfig.from_hub(json.loads(json.dumps(config.to_hub()))) == config


def test_reads_the_nested_rope_form() -> None:
    data = {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "partial_rotary_factor")}
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 30000, "partial_rotary_factor": 0.25}
    config = ModelConfig.from_hub(data)
    assert (config.rotary_base, config.partial_rotary_factor) == (30000.0, 0.25)


def test_absent_settings_are_the_8bs_and_bos_follows_eos() -> None:
    small = {"model_type": "persimmon", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config = ModelConfig.from_hub({**small, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": [3, 4]})
    assert (config.bos_token_id, config.eos_token_id, config.max_positions) == (3, 3, 16_384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "twice"),
        ({"rope_parameters": {"beta": 1}}, "beta"),
        ({"rope_parameters": 3}, "object"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": "262144"}, "an integer, got '262144'"),
        ({"vocab_size": True}, "an integer"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_attention_heads": 60}, "divisible"),
        ({"rope_theta": "25000"}, "a number"),
        ({"rope_theta": float("inf")}, "finite"),
        ({"rope_theta": 10_000, "max_position_embeddings": 32_768}, "too small"),
        ({"partial_rotary_factor": 0.01}, "rotary_dim"),
        ({"partial_rotary_factor": 1.5}, r"\(0, 1\]"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"qk_layernorm": "yes"}, "true or false"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"persimmon_rotary_precision": "float16"}, "rotary_precision"),
        ({"eos_token_id": 262_144}, "outside the vocabulary"),
        ({"bos_token_id": "1"}, "an integer"),
        ({"quantization_config": {}}, "quantization_config"),
    ],
)
def test_refuses_what_is_no_persimmon(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hub({**PUBLISHED, **change})


@pytest.mark.parametrize("document", [None, [], "text", 3])
def test_refuses_what_is_no_object(document: Any) -> None:
    with pytest.raises(ConfigError, match="object"):
        ModelConfig.from_hub(document)


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(sorted(PUBLISHED)), _JSON_VALUES)
def test_any_value_gives_a_model_or_a_named_error(key: str, value: Any) -> None:
    try:
        ModelConfig.from_hub({**PUBLISHED, key: value})
    except ConfigError as error:
        assert str(error)


def test_integers_become_numbers() -> None:
    assert ModelConfig(rotary_base=30_000) == ModelConfig(rotary_base=30_000.0)
    assert isinstance(ModelConfig(rotary_base=30_000).rotary_base, float)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="test, mini, 125m, 1b, 8b"):
        preset("7b")


def test_imports_no_torch() -> None:
    code = "import sys, persimmon.config, persimmon.accounting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
