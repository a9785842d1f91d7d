"""Training checkpoints that are whole or absent.

`checkpoints/step-00001234/` holds `model.safetensors` (the parameters that train), `optimizer.safetensors` and
`state.json`, whose hashes cover the other two. The folder is written under a temporary name, flushed to disk and
renamed, so an interrupted save leaves the older ones untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from persimmon.errors import CheckpointError
from persimmon.model import PersimmonModel

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    directory: Path,
    step: int,
    model: PersimmonModel,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` (steps done so far) and drop all but the newest `keep`."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    partial = directory / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file({k: v.detach().contiguous() for k, v in _trained(model).items()}, partial / _MODEL)
        save_file(_optimizer_tensors(optimizers), partial / _OPTIMIZER)
        hashes = {name: _hash_and_flush(partial / name) for name in (_MODEL, _OPTIMIZER)}
        (partial / _STATE).write_text(json.dumps({**state, "step": step, "sha256": hashes}, indent=2))
        _hash_and_flush(partial / _STATE)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(directory.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_newest(
    directory: Path, model: PersimmonModel, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint into model and optimizers; its state, or None when there is none."""
    found = sorted(directory.glob("step-????????"), reverse=True)
    for candidate in found:
        state = _verified_state(candidate)
        if state is None:
            continue
        _restore_model(candidate / _MODEL, model)
        _restore_optimizers(optimizers, load_file(candidate / _OPTIMIZER))
        return state
    if found:
        raise CheckpointError(f"every checkpoint in {directory} is damaged: {', '.join(p.name for p in found)}")
    return None


def _trained(model: PersimmonModel) -> dict[str, torch.nn.Parameter]:
    """What a run changes; the frozen rest comes from the base again."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _restore_model(file: Path, model: PersimmonModel) -> None:
    trained, saved = _trained(model), load_file(file)
    differing = sorted(trained.keys() ^ saved.keys())
    if differing:
        raise CheckpointError(f"{file}: the run trains other parameters: {differing[0]} is only in one of them")
    for name, parameter in trained.items():
        if parameter.shape != saved[name].shape:
            shapes = f"{list(saved[name].shape)}, the model has {list(parameter.shape)}"
            raise CheckpointError(f"{file}: {name} is {shapes}")
        parameter.copy_(saved[name])


def _verified_state(candidate: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((candidate / _STATE).read_text())
        intact = all(
            hashlib.sha256((candidate / name).read_bytes()).hexdigest() == expected
            for name, expected in state["sha256"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return state if intact else None


def _hash_and_flush(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return digest


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{group}.{position}.{key}": value.contiguous()
        for index, optimizer in enumerate(optimizers)
        for group, settings in enumerate(optimizer.param_groups)
        for position, parameter in enumerate(settings["params"])
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        index, group, position, key = name.split(".")
        optimizer = optimizers[int(index)]
        parameter = optimizer.param_groups[int(group)]["params"][int(position)]
        optimizer.state[parameter][key] = value
