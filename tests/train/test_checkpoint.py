"""Training checkpoints are whole or not there, and fit any number of processes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from made_rows import RandomRows
from persimmon.config import preset
from persimmon.errors import CheckpointError
from persimmon.model import PersimmonModel
from persimmon.train import checkpoint as module
from persimmon.train.checkpoint import Checkpoints, training_tensors
from persimmon.train.loop import LoopRecipe, Trainer
from persimmon.train.mesh import ParallelRecipe
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers
from persimmon.train.parallel import World, run_processes

Run = tuple[PersimmonModel, list[torch.optim.Optimizer]]


def trained(seed: int, matrices: str = "muon") -> Run:
    model = PersimmonModel(preset("test"))
    model.initialize(torch.Generator().manual_seed(seed), std=0.1)
    optimizers = build_optimizers(model, OptimizerRecipe(matrices=matrices))
    model(torch.arange(12)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def save(directory: Path, step: int, run: Run, state: dict[str, Any] | None = None, **rules: int) -> None:
    checkpoints = Checkpoints(directory, World(), **rules)
    checkpoints.save(step, *run, state or {})
    checkpoints.wait()


def load(directory: Path, run: Run) -> dict[str, Any] | None:
    return Checkpoints(directory, World()).load_newest(*run)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_round_trip_restores_model_and_optimizers(tmp_path: Path, matrices: str) -> None:
    run, other = trained(0, matrices), trained(1, matrices)
    save(tmp_path, 7, run, {"tokens": 42})
    state = load(tmp_path, other)
    assert state is not None and (state["step"], state["tokens"]) == (7, 42)
    expected, found = training_tensors(*run), training_tensors(*other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_fresh_optimizer_is_restored_too(tmp_path: Path) -> None:
    run = trained(0)
    save(tmp_path, 1, run)
    model = PersimmonModel(preset("test"))
    optimizers = build_optimizers(model, OptimizerRecipe())
    load(tmp_path, (model, optimizers))
    assert all(torch.equal(v, training_tensors(*run)[n]) for n, v in training_tensors(model, optimizers).items())
    assert all(float(s["step"]) == 1.0 for s in optimizers[1].state.values())


def test_what_changes_during_the_save_is_not_saved(tmp_path: Path) -> None:
    run = trained(0)
    before = {name: value.clone() for name, value in training_tensors(*run).items()}
    checkpoints = Checkpoints(tmp_path, World())
    checkpoints.save(1, *run, {})
    for value in training_tensors(*run).values():
        value.fill_(9.0)
    checkpoints.wait()
    load(tmp_path, run)
    assert all(torch.equal(value, before[name]) for name, value in training_tensors(*run).items())


def test_frozen_parameters_are_not_stored(tmp_path: Path) -> None:
    model = PersimmonModel(preset("test"))
    model.embed_tokens.requires_grad_(False)
    names = training_tensors(model, build_optimizers(model, OptimizerRecipe()))
    assert not any("embed_tokens" in name for name in names) and "model.lm_head.weight" in names


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    run = trained(0)
    for step in range(1, 8):
        save(tmp_path, step, run, keep=2, keep_every=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (3, 6, 7)]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, 1, trained(0))
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names), names


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no-state"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    run = trained(0)
    save(tmp_path, 1, run)
    save(tmp_path, 2, run)
    (victim,) = (tmp_path / "step-00000002").glob("*.safetensors")
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
    state = load(tmp_path, run)
    assert state is not None and state["step"] == 1


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    run = trained(0)
    assert load(tmp_path, run) is None
    save(tmp_path, 1, run)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000001"):
        load(tmp_path, run)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, trained(0, "muon"))
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        load(tmp_path, trained(0, "adamw"))
    wide = PersimmonModel(preset("test", hidden_size=32))
    with pytest.raises(CheckpointError, match=r"is \[.*the run needs \["):
        load(tmp_path, (wide, build_optimizers(wide, OptimizerRecipe())))


@pytest.mark.parametrize("moment", ["first file", "manifest"])
def test_a_full_disk_loses_nothing_but_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = trained(0)
    save(tmp_path, 1, run)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "manifest":
            patch.setattr(module, "_hash_and_flush", full)
        else:
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path, 2, run)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    state = load(tmp_path, run)
    assert state is not None and state["step"] == 1
    save(tmp_path, 3, run)  # once there is room again
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000003"]


def test_names_are_on_disk_before_older_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files flushed without their folders may be gone after a loss of power, the older checkpoint as well."""
    run, events = trained(0), []
    save(tmp_path, 1, run)
    flush, replace = os.fsync, os.replace

    def flushed(opened: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path))
        flush(opened)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    save(tmp_path, 2, run, keep=1)
    order = ["step-00000002.partial/state.json", "step-00000002.partial", "step-00000002.partial -> step-00000002",
             ".", "step-00000001 -> step-00000001.dropped"]  # fmt: skip
    assert [event for event in events if event in order] == order


# -- several processes -----------------------------------------------------------------------------------


def save_on_a_full_disk(world: World, directory: Path, moment: str) -> None:
    """Only the main process meets the error; the others must hear of it."""
    torch.set_num_threads(1)
    run, checkpoints = trained(0), Checkpoints(directory, world)
    checkpoints.save(1, *run, {})
    checkpoints.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if world.is_main:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*(Path, "mkdir") if moment == "folder" else (module, "_hash_and_flush"), full)
            checkpoints.save(2, *run, {})
            found = failure_of(checkpoints)
    else:
        checkpoints.save(2, *run, {})
        found = failure_of(checkpoints)
    (directory / f"failure.{world.rank}").write_text(found)
    checkpoints.save(3, *run, {})
    checkpoints.wait()


def failure_of(checkpoints: Checkpoints) -> str:
    try:
        checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return "none"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("moment", ["folder", "manifest"])
def test_a_full_disk_of_the_main_process_fails_the_save_in_all(tmp_path: Path, moment: str) -> None:
    run_processes(2, save_on_a_full_disk, tmp_path, moment)
    found = {(tmp_path / f"failure.{rank}").read_text() for rank in (0, 1)}
    assert len(found) == 1 and "No space left on device" in found.pop()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


STEPS, HALF = 6, 3


def run_part(world: World, directory: Path, parallel: ParallelRecipe, until: int, log: str) -> None:
    torch.set_num_threads(1)
    model = PersimmonModel(preset("test"))
    model.initialize(torch.Generator().manual_seed(0), std=0.1)
    recipe = LoopRecipe(parallel=parallel, optimizer=OptimizerRecipe(matrix_lr=2e-3, vector_lr=2e-3))
    source = RecordedRows(rows=4, length=16)
    trainer = Trainer(model, source, STEPS, recipe, directory, world)
    trainer.resume()
    losses = []
    while trainer.step < until:
        losses.append(trainer.train_step()["loss"])
    trainer.save()
    trainer.checkpoints.wait()
    (directory / f"{log}.{world.rank}.json").write_text(json.dumps([losses, source.taken]))


class RecordedRows(RandomRows):
    def __init__(self, rows: int, length: int) -> None:
        super().__init__(rows, length)
        self.taken: list[list[int]] = []

    def batch(self, step: int, rows: Any) -> Any:
        self.taken += [[step, row] for row in rows]
        return super().batch(step, rows)


def logged(directory: Path, log: str) -> tuple[list[float], list[list[int]]]:
    files = [json.loads(path.read_text()) for path in sorted(directory.glob(f"{log}.*.json"))]
    return files[0][0], sorted(item for _, taken in files for item in taken)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelRecipe(), ParallelRecipe(shard=True)], ids=["replicated", "sharded"])
def test_a_checkpoint_of_two_processes_goes_on_in_one_two_and_four(tmp_path: Path, parallel: ParallelRecipe) -> None:
    import shutil

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        directory.mkdir()
    run_processes(2, run_part, whole, parallel, STEPS, "whole")
    run_processes(2, run_part, broken, parallel, HALF, "first")
    expected, order = logged(whole, "whole")
    for size in (1, 2, 4):
        again = tmp_path / f"on{size}"
        shutil.copytree(broken, again)
        run_processes(size, run_part, again, parallel, STEPS, "second")
        losses, rows = logged(again, "second")
        assert rows == [item for item in order if item[0] >= HALF]  # the same data, in the same steps
        if size == 2:
            assert losses == expected[HALF:]  # bit for bit
        else:
            assert losses == pytest.approx(expected[HALF:], abs=1e-4)
