"""Training adapters: on the shipped base, on packed weights, with noise and dropout, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import persimmon
from made_conversations import write_conversations
from made_corpus import write_recipe
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import open_adapter
from persimmon.checkpoints.merging import merge
from persimmon.errors import CheckpointError, ConfigError
from persimmon.fast.cpu.quantize import quantize
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import EncodedConversation, encode_conversation
from persimmon.train.finetune import answer_bits_per_byte, finetune, load_for_training
from persimmon.train.finetune_data import load_conversations
from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.recipe import load_recipe

BASE = hub.resolve("mini-base")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Adapters on the shipped base, 48 conversations, a dozen steps."""
    write_conversations(tmp_path / "chat.jsonl")
    return {
        "model": "mini-base",
        "root": str(tmp_path),
        "output": str(tmp_path / "run"),
        "sources": {"made": {"files": ["chat.jsonl"]}},
        "lora": {"rank": 8, "alpha": 16.0},
        "epochs": 6,
        "row_length": 256,
        "batch_tokens": 1024,
        "held_out": 0.2,
        "threads": 1,
        "loop": {
            "evaluate_every": 0,
            "optimizer": {"matrices": "adamw", "matrix_lr": 0.01, "weight_decay": 0.0},
        },
    }


def train(settings: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[FinetuneRecipe, list[dict[str, Any]]]:
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings | changes, tmp_path / "recipe.yaml"))
    rows: list[dict[str, Any]] = []
    finetune(recipe, resume=False, report=rows.append)
    return recipe, rows


def held_out(recipe: FinetuneRecipe) -> list[EncodedConversation]:
    tokenizer = Tokenizer.load(hub.resolve(recipe.model))
    return [encode_conversation(tokenizer, c.messages, recipe.row_length) for c in load_conversations(recipe)[1]]


def test_adapters_on_the_frozen_base_lower_the_held_out_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe, rows = train(settings, tmp_path, epochs=10)
    items = held_out(recipe)
    model = hub.load_model(BASE, dtype=torch.float32)
    before = answer_bits_per_byte(model, items)
    adapter = lora.load_adapter(model, tmp_path / "run" / "adapter")
    after = answer_bits_per_byte(model, items)
    assert after < 0.5 * before
    assert rows[-1]["held_out"]["answers"] == pytest.approx(after, abs=1e-3)
    original = hub.load_model(BASE, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base.", ".")
        assert "lora" in name or torch.equal(tensor, original[plain]), f"{name} was frozen"
    merge(BASE, adapter.path, tmp_path / "merged", dtype=torch.float32)
    merged = hub.load_model(tmp_path / "merged", dtype=torch.float32)
    assert answer_bits_per_byte(merged, items) == pytest.approx(after, rel=1e-4)
    answer = persimmon.load("mini-base", adapter=adapter.path, device="cpu").chat(
        [{"role": "user", "content": "The sea is blue. What colour is it?"}], max_tokens=20, temperature=0
    )
    assert "blue" in answer.text


@pytest.mark.parametrize("form", ["q8", "q4"])
def test_adapters_on_packed_weights_lower_it_too(settings: dict[str, Any], tmp_path: Path, form: str) -> None:
    quantize(BASE, tmp_path / form, form)
    recipe, _ = train(settings, tmp_path, model=str(tmp_path / form), epochs=3)
    items = held_out(recipe)
    packed, _ = load_for_training(recipe, tmp_path / form)
    with lora.adapters_off(packed):
        before = answer_bits_per_byte(packed, items)
    packed, _ = load_for_training(
        load_recipe(
            FinetuneRecipe,
            tmp_path / "recipe.yaml",
            ["lora=null", f"adapter={tmp_path / 'run' / 'adapter'}"],
        ),
        tmp_path / form,
    )
    after = answer_bits_per_byte(packed, items)
    assert after < 0.7 * before
    # The adapter, learned on the rounded weights, helps the exact ones as much.
    exact = hub.load_model(BASE, dtype=torch.float32)
    lora.load_adapter(exact, tmp_path / "run" / "adapter")
    assert answer_bits_per_byte(exact, items) < 0.75 * before


def test_bfloat16_keeps_the_base_in_it_and_the_adapters_in_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["loop"]["dtype"] = "bfloat16"
    recipe, rows = train(settings, tmp_path, epochs=4)
    model, _ = load_for_training(recipe, BASE)
    types = {p.requires_grad: p.dtype for p in model.parameters()}
    assert types == {False: torch.bfloat16, True: torch.float32}
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_an_adapter_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    _, first = train(settings, tmp_path, epochs=2)
    del settings["lora"]
    settings["adapter"] = str(tmp_path / "run" / "adapter")
    _, second = train(settings, tmp_path, epochs=2, output=str(tmp_path / "further"))
    assert second[0]["loss"] < first[0]["loss"] - 0.5
    config = hub.load_model(BASE).config
    shapes = [open_adapter(tmp_path / run / "adapter", config).settings for run in ("run", "further")]
    assert shapes[0] == shapes[1]


def test_the_push_towards_zeros_leaves_a_frozen_model_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    """The penalty reaches the adapters; the lift of biases, which is no gradient, must not reach the base."""
    settings["lora"] = {"rank": 4, "targets": ["query_key_value", "dense"]}
    settings["loop"] |= {"sparsity_penalty": 1.0, "sparsity_target": 0.5}
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings | {"epochs": 1}, tmp_path / "recipe.yaml"))
    finetune(recipe, resume=False, report=lambda row: None)
    model, _ = load_for_training(recipe, BASE)
    from persimmon.train.sparsity import up_biases

    assert up_biases(model) == []
    assert up_biases(hub.load_model(BASE, dtype=torch.float32))


def test_noise_and_dropout_change_training_only(settings: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for name, changes in (
        ("plain", {}),
        ("noise", {"neftune_alpha": 5.0}),
        ("dropout", {"lora": {"rank": 8, "alpha": 16.0, "dropout": 0.3}}),
        ("noise again", {"neftune_alpha": 5.0}),
    ):
        _, rows = train(settings, tmp_path, epochs=1.5, output=str(tmp_path / name), **changes)
        losses[name] = [row["loss"] for row in rows]
    assert losses["noise"] == losses["noise again"]
    assert losses["noise"][0] != losses["plain"][0]
    assert losses["dropout"][0] == losses["plain"][0]  # B is zero before the first step: dropout shows after it
    assert losses["dropout"][1] != losses["plain"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, r"recipe\.yaml: lora: lora\.rank must be at least 1"),
        ({"lora": {"ranks": 4}}, "unknown key 'ranks'"),
        ({"adapter": "x"}, "lora and adapter exclude each other"),
        ({"loop": {"optimizer": {"matrices": "muon"}}}, "adapters train with adamw"),
        ({"neftune_alpha": -1}, "neftune_alpha must not be negative"),
        ({"preference": {"beta": 0.1}, "neftune_alpha": 5}, "preference goes with neither"),
    ],
)
def test_recipes_that_cannot_be_are_refused(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(FinetuneRecipe, write_recipe(settings | changes, tmp_path / "recipe.yaml"))


def test_packed_weights_train_no_further_than_adapters(settings: dict[str, Any], tmp_path: Path) -> None:
    quantize(BASE, tmp_path / "q8", "q8")
    del settings["lora"]
    with pytest.raises(ConfigError, match="is quantized: its weights cannot train"):
        train(settings, tmp_path, model=str(tmp_path / "q8"))


def test_an_adapter_of_another_model_is_refused_before_training(settings: dict[str, Any], tmp_path: Path) -> None:
    from made_adapters import write_random_adapter
    from tiny_directory import write_tiny_directory

    write_random_adapter(write_tiny_directory(tmp_path / "tiny"), tmp_path / "other")
    del settings["lora"]
    with pytest.raises(CheckpointError, match="the base model needs"):
        train(settings, tmp_path, adapter=str(tmp_path / "other"))


_PROGRAM = """
import sys
from persimmon.train.finetune import finetune
from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.recipe import load_recipe

def report(row):
    print(row["step"], flush=True)

if __name__ == "__main__":
    finetune(load_recipe(FinetuneRecipe, sys.argv[1]), resume=sys.argv[2] == "resume", report=report)
"""


def run(tmp_path: Path, recipe: Path, mode: str, kill_at: int | None = None) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(recipe), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if kill_at is not None and int(line) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=120)
    process.stdout.close()
    assert (process.returncode == 0) == (kill_at is None)


@pytest.mark.slow
def test_a_killed_adapter_run_repeats_the_losses_and_its_checkpoints_are_small(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With dropout and noise on, killed twice: the same losses and the same adapter, bit for bit."""
    settings |= {"neftune_alpha": 5.0, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
    settings["loop"]["checkpoint_minutes"] = 0.0
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tmp_path, write_recipe(settings | {"output": str(whole)}, tmp_path / "whole.yaml"), "new")
    recipe = write_recipe(settings | {"output": str(broken)}, tmp_path / "broken.yaml")
    run(tmp_path, recipe, "new", kill_at=3)
    run(tmp_path, recipe, "resume", kill_at=7)
    run(tmp_path, recipe, "resume")
    first, second = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (whole, broken)
    )
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    weights = [(place / "adapter" / "adapter_model.safetensors").read_bytes() for place in (whole, broken)]
    assert weights[0] == weights[1]
    newest = max((broken / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    # Weights and two moments in float32, names and headers; the base would add 36 MB.
    parameters = open_adapter(broken / "adapter", hub.load_model(BASE).config).num_parameters
    assert size < 12 * parameters + 50_000
