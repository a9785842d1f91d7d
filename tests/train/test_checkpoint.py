"""Training checkpoints are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.config import preset
from persimmon.errors import CheckpointError
from persimmon.model import PersimmonModel
from persimmon.train import checkpoint as module
from persimmon.train.checkpoint import load_newest, save_checkpoint
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers


def trained(seed: int, matrices: str = "muon") -> tuple[PersimmonModel, list[torch.optim.Optimizer]]:
    model = PersimmonModel(preset("test"))
    model.initialize(torch.Generator().manual_seed(seed), std=0.1)
    optimizers = build_optimizers(model, OptimizerRecipe(matrices=matrices))
    model(torch.arange(12)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_round_trip_restores_model_and_optimizers(tmp_path: Path, matrices: str) -> None:
    model, optimizers = trained(0, matrices)
    save_checkpoint(tmp_path, 7, model, optimizers, {"tokens": 42})
    other, restored = trained(1, matrices)
    state = load_newest(tmp_path, other, restored)
    assert state is not None and (state["step"], state["tokens"]) == (7, 42)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for old, new in zip(optimizers, restored, strict=True):
        for parameter, copy in zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
            assert old.state[parameter].keys() == new.state[copy].keys()
            assert all(torch.equal(v, new.state[copy][k]) for k, v in old.state[parameter].items())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizers, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no-state"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: str, name: str) -> None:
    model, optimizers = trained(0)
    save_checkpoint(tmp_path, 1, model, optimizers, {})
    save_checkpoint(tmp_path, 2, model, optimizers, {})
    victim = tmp_path / "step-00000002" / name
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-1])
    elif damage == "flip":
        content[-10] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (victim.parent / "state.json").write_text("{")
    state = load_newest(tmp_path, model, optimizers)
    assert state is not None and state["step"] == 1


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    assert load_newest(tmp_path, model, optimizers) is None
    save_checkpoint(tmp_path, 1, model, optimizers, {})
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_newest(tmp_path, model, optimizers)


def test_a_full_disk_loses_nothing_but_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = trained(0)
    save_checkpoint(tmp_path, 1, model, optimizers, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_hash_and_flush", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, model, optimizers, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    state = load_newest(tmp_path, model, optimizers)
    assert state is not None and state["step"] == 1
