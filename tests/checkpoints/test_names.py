from __future__ import annotations

import math

import pytest
import torch

from persimmon.checkpoints import names
from persimmon.config import ModelConfig, preset
from persimmon.model import PersimmonModel


@pytest.mark.parametrize("config", [preset("test"), preset("test", qk_layernorm=False, num_layers=3)])
def test_our_names_and_shapes_are_the_models_in_its_order(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = PersimmonModel(config)
    expected = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    assert [(parameter.ours, parameter.shape) for parameter in names.parameters(config)] == expected


def test_the_8b_has_580_tensors() -> None:
    parameters = names.parameters(preset("8b"))
    assert len(parameters) == 580
    assert sum(math.prod(parameter.shape) for parameter in parameters) == 9_397_175_296


@pytest.mark.parametrize("column", ["ours", "hub", "adept"])
def test_every_name_stands_once(column: str) -> None:
    all_names = [getattr(parameter, column) for parameter in names.parameters(preset("8b"))]
    assert len(set(all_names)) == len(all_names)
    assert not any("{" in name for name in all_names)


def test_names_as_the_sources_have_them() -> None:
    by_name = {parameter.ours: parameter for parameter in names.parameters(preset("8b"))}
    qkv = by_name["layers.35.self_attn.query_key_value.weight"]
    assert qkv.hub == "model.layers.35.self_attn.query_key_value.weight"
    assert qkv.adept == "language_model.encoder.layers.35.self_attention.query_key_value.weight"
    assert qkv.shape == (12_288, 4_096)
    assert by_name["lm_head.weight"].adept == "word_embeddings_for_head.weight"
    assert by_name["layers.0.mlp.dense_4h_to_h.weight"].shape == (4_096, 16_384)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("language_model.encoder.layers.35.self_attention.rotary_emb.inv_freq", True),
        ("model.layers.3.self_attn.rotary_emb.inv_freq.weight", False),
        ("x.model.layers.3.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.x.self_attn.rotary_emb.inv_freq", False),
    ],
)
def test_inverse_frequencies_are_known(name: str, expected: bool) -> None:
    assert names.is_inverse_frequency(name) is expected
