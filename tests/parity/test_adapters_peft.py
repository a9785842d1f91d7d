"""PEFT loads our adapters and we load PEFT's, with equal logits on transformers' Persimmon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from made_adapters import write_random_adapter
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings
from tiny_directory import write_tiny_directory
from tiny_model import tiny_ids

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SETTINGS = {
    "all": LoraSettings(rank=4, alpha=8),
    "rslora": LoraSettings(rank=8, alpha=4, rslora=True, dropout=0.1),
    "attention": LoraSettings(rank=2, alpha=16, targets=("query_key_value", "dense")),
    "one": LoraSettings(rank=3, alpha=3, targets=("dense",)),
}

# Float32 sums in another order: logits of the tiny model reach about 10.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-4}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_peft_loads_ours(tmp_path: Path, settings: LoraSettings) -> None:
    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    ours = write_random_adapter(base, tmp_path / "adapter", settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert {type(m).__name__ for m in theirs.modules()} >= {"PeftModelForCausalLM", "LoraModel"}
    ids = tiny_ids(ours.config, 2, 24)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), **TOLERANCE)
        plain = hub.load_model(base)(ids)
        assert (ours(ids) - plain).abs().max() > 0.5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_we_load_pefts(tmp_path: Path, settings: LoraSettings) -> None:
    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, use_rslora=settings.rslora,
        target_modules=list(settings.targets), task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = hub.load_model(base)
    opened = lora.load_adapter(ours, tmp_path / "adapter")
    assert opened.settings == settings
    ids = tiny_ids(ours.config, 2, 24)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **TOLERANCE)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(ours(ids), merged(ids).logits, **TOLERANCE)


def test_gradients_are_pefts(tmp_path: Path) -> None:
    """One backward pass through both: the gradients of every A and B agree."""
    settings = SETTINGS["all"]
    base = write_tiny_directory(tmp_path / "base", dtype=torch.float32)
    ours = write_random_adapter(base, tmp_path / "adapter", settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    ids = tiny_ids(ours.config, 2, 16)
    theirs(ids, labels=ids).loss.backward()
    logits = ours(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, module in lora.adapted_modules(ours).items():
        for part, parameter in (("A", module.lora_A), ("B", module.lora_B)):
            expected = gradients[f"base_model.model.model.{name}.lora_{part}.default.weight"]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4)
