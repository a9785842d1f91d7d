"""Logits, gradients and greedy text against transformers' PersimmonForCausalLM, an implementation of other hands.

Same weights in both, tiny and random. In float32 transformers runs its eager attention, so that not even the attention
kernel is shared; its float64 runs, the oracle, use `sdpa`, because eager takes the softmax in float32 always. Its class
defaults differ from the release (rope base 10000), so every field is written out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persimmon.config import ModelConfig
from persimmon.model import PersimmonModel, rotary_tables
from tiny_model import tiny_ids, tiny_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def their_config(config: ModelConfig, attention: str = "eager") -> Any:
    """transformers' configuration of the same model, no default left to it."""
    return transformers.PersimmonConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        hidden_act="relu2",
        max_position_embeddings=config.max_positions,
        layer_norm_eps=config.layer_norm_eps,
        qk_layernorm=config.qk_layernorm,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        attn_implementation=attention,
    )


def their_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def their_model(model: PersimmonModel) -> Any:
    """The same weights and dtype in transformers; a missing or left-over tensor is an error."""
    dtype = model.lm_head.weight.dtype
    config = their_config(model.config, "sdpa" if dtype is torch.float64 else "eager")
    theirs = transformers.PersimmonForCausalLM(config).to(dtype).eval()
    theirs.load_state_dict({their_name(name): tensor for name, tensor in model.state_dict().items()}, strict=True)
    return theirs


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Random heads, head sizes, rotary shares, depths and bases, with and without QK LayerNorm."""
    heads, half_dim = draw(st.integers(1, 6)), draw(st.integers(2, 8))
    rotary_dim = 2 * draw(st.integers(1, half_dim))
    return {
        "num_heads": heads,
        "hidden_size": heads * 2 * half_dim,
        "partial_rotary_factor": (rotary_dim + 0.5) / (2 * half_dim) if rotary_dim < 2 * half_dim else 1.0,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(2, 90)),
        "rotary_base": draw(st.sampled_from([10_500.0, 25_000.0, 1_000_000.0])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "qk_layernorm": draw(st.sampled_from([True, True, False])),
        "seed": draw(st.integers(0, 1000)),
    }


batches = st.tuples(st.integers(1, 4), st.integers(1, 40))


@settings(max_examples=25)
@given(shape=shapes(), batch=batches)
def test_logits_equal(shape: dict[str, Any], batch: tuple[int, int]) -> None:
    model = tiny_model(**shape)
    ids = tiny_ids(model.config, *batch)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), their_model(model)(ids).logits, atol=1e-4, rtol=0)
        model.double()
        oracle = their_model(model)(ids).logits
        assert oracle.dtype is torch.float64
        torch.testing.assert_close(model(ids), oracle, atol=1e-9, rtol=0)
        torch.testing.assert_close(model.float()(ids), oracle.float(), atol=1e-4, rtol=0)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@settings(max_examples=15)
@given(shape=shapes(), batch=st.tuples(st.integers(1, 3), st.integers(2, 24)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_gradients_equal(dtype: torch.dtype, tolerance: float, shape: dict[str, Any], batch: tuple[int, int]) -> None:
    model = tiny_model(**shape).to(dtype)
    theirs, ids = their_model(model), tiny_ids(model.config, *batch)
    loss_of(model(ids), ids).backward()
    loss_of(theirs(ids).logits, ids).backward()
    for name, parameter in model.named_parameters():
        expected = theirs.get_parameter(their_name(name)).grad
        torch.testing.assert_close(
            parameter.grad, expected, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=10)
@given(shape=shapes(), chunks=st.lists(st.integers(1, 12), min_size=2, max_size=6), rows=st.integers(1, 3))
def test_their_cache_equals_our_whole(shape: dict[str, Any], chunks: list[int], rows: int) -> None:
    model = tiny_model(**shape)
    theirs, ids = their_model(model), tiny_ids(model.config, rows, sum(chunks))
    cache = transformers.DynamicCache(config=theirs.config)
    with torch.inference_mode():
        parts = [theirs(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(model(ids), torch.cat(parts, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_another_order_of_the_fused_rows_does_not_pass(num_heads: int) -> None:
    """The tests above can fail: [3, heads, head_dim] fits every shape and is far off, unless there is one head."""
    model = tiny_model(hidden_size=32, num_heads=num_heads)
    theirs, ids = their_model(model), tiny_ids(model.config, 1, 16)
    with torch.inference_mode():
        for block in model.layers:
            for parameter in block.self_attn.query_key_value.parameters():
                fused = parameter.view(num_heads, 3, model.config.head_dim, -1)
                parameter.copy_(fused.transpose(0, 1).reshape(parameter.shape))
        difference = float((model(ids) - theirs(ids).logits).abs().max())
    assert difference < 1e-4 if num_heads == 1 else difference > 0.1


def test_rotary_tables_are_bit_equal() -> None:
    """At position 16,383 one unit in the last place of a frequency would already show."""
    config = tiny_model(hidden_size=128, num_heads=2).config
    positions = torch.arange(16384)
    theirs = transformers.models.persimmon.modeling_persimmon.PersimmonRotaryEmbedding(their_config(config))
    expected = theirs(torch.zeros(1), positions[None])
    for ours, (their,) in zip(rotary_tables(config, positions), expected, strict=True):
        assert torch.equal(ours, their[:, : ours.shape[1]])
        assert torch.equal(ours, their[:, ours.shape[1] :])


def test_256_greedy_tokens_are_the_same() -> None:
    model = tiny_model(hidden_size=32, num_heads=4, eos_token_id=0)
    theirs, ids = their_model(model), tiny_ids(model.config, 1, 8)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=256, min_new_tokens=256, eos_token_id=0, pad_token_id=0, use_cache=True
    )
    with torch.inference_mode():
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found = ids
        while found.shape[1] < expected.shape[1]:
            logits = model.lm_head(model.features(found)[:, -1])
            logits[:, 0] = -torch.inf  # as min_new_tokens does to the end of text
            found = torch.cat((found, logits.argmax(-1, keepdim=True)), 1)
    assert len(found[0].unique()) > 20, "the model repeats itself; the test would prove little"
    assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_16384_tokens_equal() -> None:
    """The whole context at once against theirs in cached chunks, logits of the last 64 positions."""
    model = tiny_model(num_layers=2, num_heads=1)
    theirs, ids = their_model(model), tiny_ids(model.config, 1, 16384)
    cache = transformers.DynamicCache(config=theirs.config)
    with torch.inference_mode():
        for part in ids.split(512, dim=1):
            expected = theirs(part, past_key_values=cache, use_cache=True, logits_to_keep=64).logits
        found = model.lm_head(model.features(ids)[:, -64:])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
