"""Training checkpoints that are whole or absent, for any number of processes.

`checkpoints/step-00001234/` holds safetensors files written by PyTorch's distributed checkpointing, each process its
own share of weights and optimizer states, and `state.json`, whose hashes cover them. It holds no pickles. The folder
is written under a temporary name, flushed to disk and renamed, so an interrupted save leaves the older ones untouched.
Tensors are stored by parameter name and offset: a checkpoint of two processes can be read by one, four or any other
layout. Saving goes on in the background from a copy in the host's memory while the next steps run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from persimmon.errors import CheckpointError
from persimmon.train.adamw8bit import AdamW8bit, fresh_state
from persimmon.train.parallel import World

_STATE = "state.json"


class Checkpoints:
    """The checkpoints of a run. All processes call every method together; one save is under way at a time."""

    def __init__(self, directory: Path, world: World, keep: int = 2, keep_every: int = 0) -> None:
        self._directory, self._world = directory, world
        self._keep, self._keep_every = keep, keep_every
        # Its own group: messages of a save in the background must not mix with those of the steps.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
    ) -> None:
        """Start writing the checkpoint of `step`; raises CheckpointError when the one before it failed."""
        self.wait()
        copies = {name: _copy(value) for name, value in training_tensors(model, optimizers).items()}
        self._pending = self._thread.submit(self._write, step, copies, {**state, "step": step})

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointError when it failed; the older ones are untouched."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # PyTorch's is no Exception; it holds one per process
            causes = getattr(error, "failures", {})
            cause = next(iter(causes.values()))[0] if causes else error
            raise CheckpointError(f"a checkpoint could not be written: {cause}") from error

    def load_newest(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint into model and optimizers; its state, or None when there is none."""
        found: list[Any] = [newest_whole(self._directory) if self._world.is_main else None]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        if found[0] is None:
            return None
        if isinstance(found[0], CheckpointError):
            raise found[0]
        path, state = found[0]
        tensors = training_tensors(model, optimizers)
        _check_names(path, tensors)
        with warnings.catch_warnings():  # that there is no process group, or nothing to plan
            warnings.simplefilter("ignore")
            load_distributed(
                dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=self._group, no_dist=self._group is None,
            )  # fmt: skip
        return dict(state)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        final = self._directory / f"step-{step:08d}"
        partial = self._directory / f"{final.name}.partial"
        self._on_main(lambda: self._make_room(partial))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Returns in the main process when every process has written and flushed its files.
                save_distributed(
                    tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                    process_group=self._group, no_dist=self._group is None,
                )  # fmt: skip
            self._on_main(lambda: self._finish(partial, final, state))
        except BaseException:
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do it in the main process alone; its error is raised in all, which else would wait for it in vain."""
        failure: list[Any] = [None]
        if self._world.is_main:
            try:
                work()
            except Exception as error:  # raised below
                failure[0] = error
        if self._group is not None:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise failure[0]

    def _make_room(self, partial: Path) -> None:
        """An empty folder to write in, without what a run that was killed has left."""
        for left in (partial, *self._directory.glob("step-????????.*")):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        _complete(partial, final, state)
        self._drop_old()

    def _drop_old(self) -> None:
        """Keep the newest `keep`, and for good those whose step is a multiple of `keep_every`."""
        for old in sorted(self._directory.glob("step-????????"))[: -self._keep]:
            if not (self._keep_every and int(old.name[5:]) % self._keep_every == 0):
                _remove(old)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under another name first: a kill halfway must not leave half of one."""
    dropped = checkpoint.with_name(f"{checkpoint.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    os.replace(checkpoint, dropped)
    shutil.rmtree(dropped)


def training_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything a run changes, by name: parameters that are trained and their optimizer states, which are made if new.

    Frozen weights come from the model the run starts with.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    continue
                if not optimizer.state[parameter]:
                    optimizer.state[parameter].update(_new_state(optimizer, parameter))
                for key, value in optimizer.state[parameter].items():
                    # Files hold slices: a step count without dimensions travels as one element, in the same memory.
                    tensors[f"optimizer.{names[parameter]}.{key}"] = value.view(1) if value.dim() == 0 else value
    return tensors


def _new_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state that the first step of Muon or AdamW would make."""
    if isinstance(optimizer, AdamW8bit):
        return fresh_state(parameter)
    if not isinstance(optimizer, torch.optim.AdamW):
        return {"momentum": torch.zeros_like(parameter)}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _copy(value: Tensor) -> Tensor:
    """In the host's memory, also of a DTensor's own part: a GPU full of training has no room for another copy."""
    return value.detach().to("cpu", copy=True)


def _check_names(path: Path, tensors: dict[str, Tensor]) -> None:
    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    missing = sorted(set(tensors) - set(stored))
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: another model or optimizer")
    for name, value in tensors.items():
        if stored[name].size != value.shape:  # type: ignore[union-attr]
            size = list(stored[name].size)  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: {name} is {size}, the run needs {list(value.shape)}")


def _complete(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Hash and flush what was written, add the manifest, and give the folder its name."""
    hashes = {file.name: _hash_and_flush(file) for file in sorted(partial.iterdir())}
    (partial / _STATE).write_text(json.dumps({**state, "sha256": hashes}, indent=2))
    _hash_and_flush(partial / _STATE)
    _flush_names(partial)
    if final.exists():
        _remove(final)
    os.replace(partial, final)
    _flush_names(final.parent)


def newest_whole(directory: Path) -> tuple[Path, dict[str, Any]] | CheckpointError | None:
    """The newest undamaged checkpoint and its state; None when there is none at all; an error when all are damaged."""
    found = sorted(directory.glob("step-????????"), reverse=True)
    for candidate in found:
        state = verified_state(candidate)
        if state is not None:
            return candidate, state
    if found:
        return CheckpointError(f"every checkpoint in {directory} is damaged: {', '.join(p.name for p in found)}")
    return None


def verified_state(candidate: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are all there and as they were written, else None."""
    try:
        state: dict[str, Any] = json.loads((candidate / _STATE).read_text())
        intact = bool(state["sha256"]) and all(
            _digest(candidate / name) == expected for name, expected in state["sha256"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return state if intact else None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_and_flush(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return digest


def _flush_names(directory: Path) -> None:
    """Put the names in a folder on disk, which flushing the files does not: they must outlast a loss of power."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
