"""Adapters on the reference model: what trains, what they compute, and every way to run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import persimmon
from made_adapters import attach_random, write_random_adapter
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, count_adapter
from persimmon.errors import ConfigError, InputError, UnavailableError
from tiny_directory import write_tiny_directory
from tiny_model import tiny_ids, tiny_model

SETTINGS = LoraSettings(rank=4, alpha=8)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains() -> None:
    plain, model = tiny_model(), tiny_model()
    lora.attach(model, SETTINGS)
    ids = tiny_ids(model.config, 2, 9)
    assert torch.equal(model(ids), plain(ids))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count_adapter(model.config, SETTINGS)
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    model(ids).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [("query_key_value",), ("dense", "dense_4h_to_h")], ids="-".join)
def test_any_subset_of_the_matrices(targets: tuple[str, ...]) -> None:
    model = tiny_model()
    lora.attach(model, LoraSettings(rank=2, targets=targets))
    adapted = lora.adapted_modules(model)
    assert {name.rpartition(".")[2] for name in adapted} == set(targets)
    assert len(adapted) == len(targets) * model.config.num_layers


def test_an_adapted_matrix_is_the_merged_matrix() -> None:
    model = tiny_model()
    attach_random(model, SETTINGS)
    module = lora.adapted_modules(model)["layers.0.mlp.dense_h_to_4h"]
    x = torch.randn(5, model.config.hidden_size)
    base = module.base
    assert isinstance(base, torch.nn.Linear)
    merged = base.weight + lora.low_rank_update(module.lora_A, module.lora_B, SETTINGS.scale)
    expected = torch.nn.functional.linear(x, merged, base.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_outside_of_training_and_scaling_follows_the_rank() -> None:
    model = tiny_model()
    attach_random(model, LoraSettings(rank=4, dropout=0.5))
    ids = tiny_ids(model.config, 1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    assert LoraSettings(rank=16, alpha=8).scale == 0.5
    assert LoraSettings(rank=16, alpha=8, rslora=True).scale == 2.0


def test_adapters_can_be_turned_off() -> None:
    plain, model = tiny_model(), tiny_model()
    attach_random(model, SETTINGS)
    ids = tiny_ids(model.config, 1, 8)
    with lora.adapters_off(model):
        assert torch.equal(model(ids), plain(ids))
    assert not torch.allclose(model(ids), plain(ids), atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"lora\.rank must be at least 1"),
        ({"alpha": 0.0}, r"lora\.alpha must be positive"),
        ({"dropout": 1.0}, r"lora\.dropout must be in \[0, 1\)"),
        ({"targets": ("lm_head",)}, "'lm_head' is none"),
        ({"targets": ()}, r"lora\.targets must be"),
        ({"targets": ("dense", "dense")}, r"lora\.targets must be different"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**changes)  # type: ignore[arg-type]


def test_a_second_adapter_is_refused() -> None:
    model = tiny_model()
    lora.attach(model, SETTINGS)
    with pytest.raises(InputError, match="already has an adapter"):
        lora.attach(model, SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_every_engine_runs_an_adapter(tmp_path: Path, engine: str, dtype: torch.dtype) -> None:
    """The cpu engine merges at load; with float32 weights both give the unmerged model's logits."""
    base = write_tiny_directory(tmp_path / "base", dtype=dtype)
    model = write_random_adapter(base, tmp_path / "adapter")
    ids = tiny_ids(model.config, 1, 12)
    loaded = persimmon.load(base, adapter=tmp_path / "adapter", engine=engine, dtype="float32", device="cpu")
    # bfloat16 checkpoints keep their type in the cpu engine, so the merged matrices are rounded to it (2^-9 relative).
    tolerance = 2e-4 if engine == "reference" or dtype is torch.float32 else 0.1
    with torch.inference_mode():
        torch.testing.assert_close(loaded.logits(ids), model(ids), rtol=tolerance, atol=tolerance)
    assert any("adapter" in line for line in loaded.choices)
    without = persimmon.load(base, engine=engine, dtype="float32", device="cpu").logits(ids)
    assert (without - loaded.logits(ids)).abs().max() > 0.5


def test_an_adapter_on_quantized_weights_is_refused(tmp_path: Path) -> None:
    from persimmon.fast.cpu.load import load_decoder
    from persimmon.fast.cpu.quantize import quantize

    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    write_random_adapter(base, tmp_path / "adapter")
    quantize(base, tmp_path / "q8", "q8")
    with pytest.raises(UnavailableError, match=r"quantized .*merge"):
        persimmon.load(tmp_path / "q8", adapter=tmp_path / "adapter", device="cpu")
    with pytest.raises(UnavailableError, match="quantized"):
        load_decoder(tmp_path / "q8", adapter=tmp_path / "adapter")


def test_a_loaded_model_generates_with_its_adapter(tmp_path: Path) -> None:
    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    write_random_adapter(base, tmp_path / "adapter")
    texts = [
        persimmon.load(base, engine="reference", device="cpu", **options).generate("the", max_tokens=12, temperature=0)
        for options in ({}, {"adapter": tmp_path / "adapter"})
    ]
    assert texts[0].token_ids != texts[1].token_ids
    assert hub.load_model(base).config == persimmon.load(base, device="cpu").config


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_the_engine_of_the_server_runs_an_adapter(tmp_path: Path, engine: str) -> None:
    """A file of prompts goes through the server's engine, over a paged cache: the text is that of `load`."""
    from persimmon.cli.main import main

    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    write_random_adapter(base, tmp_path / "adapter")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the light"}\n')
    files = ["--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    options = ["--adapter", str(tmp_path / "adapter"), "--engine", engine, "--device", "cpu"]
    assert main(["generate", str(base), *files, *options, "--temperature", "0", "--max-tokens", "8"]) == 0
    answer = json.loads((tmp_path / "answers.jsonl").read_text())
    loaded = persimmon.load(base, engine=engine, device="cpu", adapter=tmp_path / "adapter")
    assert answer["text"] == loaded.generate("the light", max_tokens=8, temperature=0).text
