"""Directories written here load in transformers and say the same, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from made_checkpoints import made_config, made_model, made_tokenizer, same_tensors
from persimmon import chat
from persimmon.checkpoints.hub import load_model, save_model
from persimmon.model import PersimmonModel
from persimmon.tokenizer import END_OF_TEXT, Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "the human: adept, testing",
    "",
    "  two  spaces\n\n\tand \u00e9\u4f60\U0001f600",
    "<0x0A><unk>\u2581",
]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return made_tokenizer()


def saved(tokenizer: Tokenizer, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PersimmonModel:
    model = made_model(made_config(tokenizer), dtype=dtype)
    save_model(model, tokenizer, directory, **settings)
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 9_000])
def test_the_same_logits(tokenizer: Tokenizer, tmp_path: Path, max_shard_bytes: int) -> None:
    model = saved(tokenizer, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    assert theirs.dtype == torch.float32
    ids = torch.randint(0, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (theirs(ids).logits - model(ids)).abs().max()
    assert difference < 1e-4


def test_every_setting_arrives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """None is left to transformers' defaults: other values than those all come through."""
    config = made_config(tokenizer, max_positions=2_048, rotary_base=12_345.0, layer_norm_eps=1e-3)
    model = made_model(config)
    save_model(model, tokenizer, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    ids = torch.arange(100).view(1, 100)
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert theirs.config.max_position_embeddings == 2_048
    assert theirs.config.hidden_dropout == 0.0
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == tokenizer.eos_id


def test_stored_types_arrive(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = saved(tokenizer, tmp_path / "m", torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        other = state[name if name == "lm_head.weight" else f"model.{name}"]
        assert other.dtype == torch.bfloat16 and torch.equal(other, tensor)


def test_the_same_ids_and_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved(tokenizer, tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the thing"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == END_OF_TEXT + chat.render(messages)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat.encode(tokenizer, messages)


def test_the_same_greedy_continuation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = saved(tokenizer, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    ids = torch.tensor([tokenizer.encode("the human", bos=True)])
    generated = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    ours = ids[0].tolist()
    with torch.no_grad():
        while len(ours) < len(generated):
            ours.append(int(model(torch.tensor([ours]))[0, -1].argmax()))
    assert ours == generated


@pytest.mark.parametrize("max_shard_size", ["50GB", "9KB"])
def test_what_transformers_saves_loads_here(tmp_path: Path, max_shard_size: str) -> None:
    """And goes back without a bit changed."""
    rope = {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5}
    theirs = transformers.PersimmonForCausalLM(
        transformers.PersimmonConfig(
            vocab_size=294, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            hidden_act="relu2", max_position_embeddings=512, rope_parameters=rope, bos_token_id=1, eos_token_id=1,
            pad_token_id=None,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours = load_model(tmp_path / "theirs")
    assert ours.config.rotary_base == 20_000.0
    ids = torch.arange(50).view(1, 50)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    save_model(ours, made_tokenizer(), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def test_old_configurations_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The form of transformers 4: rope_theta and partial_rotary_factor at the top."""
    model = saved(tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config and same_tensors(loaded, model)
