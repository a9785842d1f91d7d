"""The memory plan: the 8B's figures, and every part held to the bytes that a small model's step really takes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from live_bytes import LiveBytes
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.errors import InputError
from persimmon.fast.cpu.quantize import quantize
from persimmon.model import PersimmonModel
from persimmon.train import memory_plan, optimizer, qlora
from persimmon.train.activations import keep_activations
from persimmon.train.loop import Batch
from persimmon.train.loss import chunk_for
from persimmon.train.memory_plan import Setup, advice, plan, total_bytes
from persimmon.train.objective import AnswerLoss
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers
from tiny_directory import write_tiny_directory
from tiny_model import tiny_ids

EIGHT = preset("8b")
QLORA = Setup("q4", "bfloat16", LoraSettings(), "adamw", 4096, recompute=True)
GIGA = 10**9

SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "num_layers": 6}
TOKENS = 256
ADAPTERS = LoraSettings(rank=4)


@pytest.mark.parametrize(
    ("setup", "budget"),
    [
        (QLORA, 24),
        (dataclasses.replace(QLORA, weights="q8"), 24),
        (dataclasses.replace(QLORA, micro_tokens=16_384), 24),
        (dataclasses.replace(QLORA, weights="bfloat16", micro_tokens=16_384), 40),
        (Setup("bfloat16", "bfloat16", None, "int8", 16_384, recompute=True), 80),
    ],
    ids=["qlora-q4", "qlora-q8", "qlora-16k", "lora-16k", "whole-16k"],
)
def test_the_8b_fits(setup: Setup, budget: int) -> None:
    assert total_bytes(plan(EIGHT, setup)) < budget * GIGA


def test_the_8b_without_any_of_it_does_not_fit_and_the_advice_leads_there() -> None:
    whole = Setup("float32", "bfloat16", None, "adamw", 8192, recompute=False)
    assert total_bytes(plan(EIGHT, whole)) > 200 * GIGA
    steps = advice(EIGHT, whole, 80 * GIGA)
    assert [size for _, size in steps] == sorted((size for _, size in steps), reverse=True)
    assert steps[-1][1] <= 80 * GIGA < steps[-2][1]
    to_a_laptop = advice(EIGHT, whole, 14 * GIGA)
    assert to_a_laptop[-1][0].startswith("model: quantized to q4") and to_a_laptop[-1][1] < 14 * GIGA
    assert advice(EIGHT, QLORA, 24 * GIGA) == []


def parts(setup: Setup, **changes: Any) -> dict[str, int]:
    config = preset("test", **SHAPE)
    return {part.name: part.bytes for part in plan(config, dataclasses.replace(setup, **changes))}


def test_logits_are_counted_in_the_chunks_of_a_gpu() -> None:
    """Small vocabularies take more positions at once there (loss.chunk_for); a packed head never does."""
    config = preset("mini")
    for weights, positions in (("bfloat16", chunk_for(torch.device("cuda"), config.vocab_size)), ("q4", 512)):
        setup = dataclasses.replace(QLORA, weights=weights, micro_tokens=16_384)
        (logits,) = (part for part in plan(config, setup) if part.name == "logits")
        assert logits.bytes == positions * config.vocab_size * (20 if weights == "q4" else 12)
        assert logits.what == f"{positions:,} positions at a time"


@pytest.mark.parametrize("name", ["mini", "125m", "1b", "8b"])
def test_an_update_by_muon_takes_less_than_the_backward_pass(name: str) -> None:
    """With as few tokens as the plan advises; test_optimizer.py counts the five tensors of what is made at once."""
    config = preset(name)
    setup = Setup("float32", "bfloat16", None, "muon", 1024, recompute=True)
    gone = ("block inputs", "hidden states", "one block", "logits")
    backward = sum(part.bytes for part in plan(config, setup) if part.name in gone)
    layers, hidden, width = config.num_layers, config.hidden_size, config.intermediate_size
    all_alike = max(2 * layers * hidden * width, 4 * layers * hidden**2)
    at_once = max(min(optimizer._TOGETHER, all_alike), hidden * width, 3 * hidden**2)
    assert 5 * 4 * at_once < backward


def made_batch() -> Batch:
    ids = tiny_ids(preset("test", **SHAPE), 1, TOKENS)
    return Batch(ids, ids.clone(), [0, 100, TOKENS], (0,))


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def built(setup: Setup, place: Path) -> PersimmonModel:
    if setup.weights in memory_plan.PACKED:
        quantize(write_tiny_directory(place / "base", dtype=torch.bfloat16, **SHAPE), place / "packed", setup.weights)
        model = qlora.load_packed_model(place / "packed", dtype=getattr(torch, setup.compute))
    else:
        model = PersimmonModel(preset("test", **SHAPE)).to(getattr(torch, setup.weights))
        model.initialize(torch.Generator().manual_seed(0), std=0.05)
    if setup.lora is not None:
        lora.attach(model, setup.lora)
    if setup.recompute:
        keep_activations(model, "none")
    return model


SETUPS = {
    "whole": Setup("float32", "float32", None, "adamw", TOKENS, recompute=False),
    "whole-recompute": Setup("float32", "float32", None, "adamw", TOKENS, recompute=True),
    "whole-bfloat16-int8": Setup("bfloat16", "bfloat16", None, "int8", TOKENS, recompute=False),
    "muon-autocast": Setup("float32", "bfloat16", None, "muon", TOKENS, recompute=False),
    "lora": Setup("float32", "float32", ADAPTERS, "adamw", TOKENS, recompute=False),
    "lora-bfloat16": Setup("bfloat16", "bfloat16", ADAPTERS, "adamw", TOKENS, recompute=False),
    "lora-recompute": Setup("bfloat16", "bfloat16", ADAPTERS, "adamw", TOKENS, recompute=True),
    "qlora-q4": Setup("q4", "float32", ADAPTERS, "adamw", TOKENS, recompute=True),
    "qlora-q8": Setup("q8", "bfloat16", ADAPTERS, "adamw", TOKENS, recompute=False),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=list(SETUPS))
def test_every_part_is_what_a_step_takes(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and moments to the byte; the peak of the step is never above the plan.

    The plan adds up parts that do not all exist at the same moment, and counts what GPUs keep in float32, so the peak
    may be as low as half of it.
    """
    monkeypatch.setattr(qlora, "SLICE_BYTES", 16 << 10)
    monkeypatch.setattr(memory_plan, "_SLICE_BYTES", 16 << 10)
    planned, model = parts(setup), built(setup, tmp_path)
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if setup.compute == "bfloat16" else contextlib.nullcontext()
    with LiveBytes() as live:
        with autocast:
            loss = AnswerLoss().loss(model, made_batch(), 1 / TOKENS, None)
        loss.backward()
        peak = live.peak
    frozen = qlora.packed_bytes(model)
    if setup.lora is not None:
        assert planned["frozen model"] == frozen
        assert planned["adapters"] == size(trained)
    else:
        assert planned["model"] == size(trained) and frozen == 0
    assert planned["gradients"] == size(p.grad for p in trained)
    moved = sum(
        b for name, b in planned.items() if name not in ("model", "frozen model", "adapters", "optimizer", "reserve")
    )
    assert peak <= moved
    assert peak >= 0.5 * moved
    optimizers = optimizers_of(model, setup)
    for one in optimizers:
        one.step()
    moments = size(t for o in optimizers for s in o.state.values() for name, t in s.items() if name != "step")
    # Small parameters keep float32 moments under int8; in a model this small they are a larger share than in the 8B.
    assert moments == pytest.approx(planned["optimizer"], rel=0.12 if setup.optimizer == "int8" else 0)


def optimizers_of(model: PersimmonModel, setup: Setup) -> list[torch.optim.Optimizer]:
    matrices = "muon" if setup.optimizer == "muon" else "adamw"
    state = "int8" if setup.optimizer == "int8" else "float32"
    return build_optimizers(model, OptimizerRecipe(matrices=matrices, state=state))


@pytest.mark.parametrize("name", ["lora", "lora-bfloat16", "whole"])
def test_activations_kept_per_block(name: str, tmp_path: Path) -> None:
    """What remains of a block after the forward pass: the formula in float32, less than it in bfloat16."""
    kept = {}
    for layers in (2, 6):
        setup = SETUPS[name]
        config = preset("test", **(SHAPE | {"num_layers": layers}))
        model = PersimmonModel(config).to(getattr(torch, setup.weights))
        model.initialize(torch.Generator().manual_seed(0), std=0.05)
        if setup.lora is not None:
            lora.attach(model, setup.lora)
        autocast = (
            torch.autocast("cpu", dtype=torch.bfloat16) if setup.compute == "bfloat16" else contextlib.nullcontext()
        )
        batch = made_batch()
        with LiveBytes() as live, autocast:
            hidden = model.features(batch.token_ids, documents=batch.documents)
            kept[layers] = live.now
        assert hidden.requires_grad
    counted = (kept[6] - kept[2]) / 4 / TOKENS
    formula = memory_plan.block_bytes_per_token(preset("test", **SHAPE), SETUPS[name])
    if SETUPS[name].compute == "float32":
        assert counted == pytest.approx(formula, rel=0.02)
    else:
        assert 0.6 * formula < counted <= formula


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = built(
            dataclasses.replace(SETUPS["lora"], recompute=recompute, lora=LoraSettings(rank=4, dropout=0.2)), Path()
        )
        for module in lora.adapted_modules(model).values():
            module.lora_B.data.fill_(0.05)
        AnswerLoss(neftune_alpha=5.0).loss(model, made_batch(), 1.0, None).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_setups_that_cannot_be() -> None:
    with pytest.raises(InputError, match="q4 weights are frozen"):
        dataclasses.replace(QLORA, lora=None)
    with pytest.raises(InputError, match="weights must be one of"):
        dataclasses.replace(QLORA, weights="int3")


def test_the_verb_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    words = [
        "finetune",
        str(root / "configs/qlora.yaml"),
        "--plan",
        "--set",
        "model=8b",
        "--set",
        "loop.dtype=bfloat16",
    ]
    assert main([*words, "--weights", "q4", "--memory", "24", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] and document["total_bytes"] == sum(part["bytes"] for part in document["parts"])
    assert document["setup"]["micro_tokens"] == 4096 and document["trained_parameters"] == 37_748_736
    assert main([*words, "--weights", "q8", "--memory", "15"]) == 0
    assert "does not fit into 15.0 GB" in capsys.readouterr().out
    assert main([*words[:2], "--memory", "15"]) == 2
    assert "belong to --plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "lora", "dpo"])
def test_every_recipe_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert main(["finetune", str(root / f"configs/{name}.yaml"), "--plan"]) == 0
    assert "in all" in capsys.readouterr().out
    assert hub.resolve("mini-base").is_dir()
