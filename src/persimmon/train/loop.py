"""The training loop: a plan of steps, and one step after the other until the plan is done.

Everything random follows from (seed, step), so a run killed at any point and resumed from its last checkpoint
repeats the same losses bit for bit on CPUs (same number of processes, threads and dtype). On a GPU data and schedule
repeat, the losses up to rounding: the backward pass of its attention adds in no fixed order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from persimmon.errors import CheckpointError, PersimmonError
from persimmon.lora import adapter_tensors
from persimmon.model import PersimmonModel
from persimmon.train.activations import keep_activations
from persimmon.train.checkpoint import Checkpoints
from persimmon.train.fused import use_kernels
from persimmon.train.memory import keep_freed_memory
from persimmon.train.mesh import distribute, gather_model, make_layout, own_part, reshard
from persimmon.train.objective import Objective
from persimmon.train.optimizer import build_optimizers
from persimmon.train.parallel import World
from persimmon.train.passes import Batch, BatchSource, StepPasses, StepResult
from persimmon.train.settings import LoopRecipe, ScheduleRecipe
from persimmon.train.signals import StopSignals, TrainingInterrupted
from persimmon.train.sparsity import lifts, up_biases
from persimmon.train.tracking import SpeedMeter, Tracker

__all__ = ["Batch", "BatchSource", "LoopRecipe", "ScheduleRecipe", "Trainer", "TrainingStopped"]


class TrainingStopped(PersimmonError, RuntimeError):
    """The loss went wrong; the last checkpoint is from before."""


class Trainer:
    """Model, optimizers and data of one run in one process of `world`."""

    def __init__(
        self,
        model: PersimmonModel,
        source: BatchSource,
        num_steps: int,
        recipe: LoopRecipe,
        directory: Path,
        world: World,
        evaluate: Callable[[PersimmonModel], dict[str, Any]] | None = None,
        report: Callable[[dict[str, Any]], None] = lambda row: None,
        sample: Callable[[PersimmonModel], str] | None = None,
        objective: Objective | None = None,
    ) -> None:
        if world.device.type == "cpu":
            keep_freed_memory()
        self.model, self.source, self.num_steps = model.to(world.device), source, num_steps
        self.recipe, self.directory, self.world = recipe, directory, world
        self._evaluate, self._sample, self._report = evaluate, sample, report
        dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        layout = make_layout(world, recipe.parallel)
        self._passes = StepPasses(model, source, recipe, world, layout, num_steps, objective)
        for rows, length in {(source.rows(s), source.row_length(s)) for s in range(num_steps)}:
            self._passes.check(rows, length)
        if recipe.kernels == "auto" and not recipe.compile and not recipe.parallel.splits_weights:
            use_kernels(model)
        keep_activations(model, recipe.activations)
        if recipe.compile:
            for block in model.layers:
                block.compile()
        distribute(model, layout, recipe.parallel, dtype)
        self._up_biases = up_biases(model)
        self._split = layout.mesh is not None and recipe.parallel.splits_weights
        self.optimizers = build_optimizers(model, recipe.optimizer, dtype)
        self.checkpoints = Checkpoints(directory / "checkpoints", world, recipe.keep_checkpoints, recipe.keep_every)
        self._tokens_total = sum(source.rows(s) * source.row_length(s) for s in range(num_steps))
        self.step, self.tokens_seen = 0, 0
        self._running_loss: float | None = None
        self._skipped = 0
        self._meter = SpeedMeter(model.config, world, dtype, sum(a.numel() for a in adapter_tensors(model).values()))

    # -- one step ------------------------------------------------------------------------------------

    def learning_rate_factor(self) -> float:
        """The schedule's multiplier for the coming step."""
        return self.recipe.schedule.factor(self.tokens_seen / self._tokens_total)

    def sparsity_penalty(self) -> float:
        """The penalty's weight in the coming step: 0 before its start and after its end."""
        recipe, total = self.recipe, self._tokens_total
        inside = recipe.sparsity_start * total <= self.tokens_seen < recipe.sparsity_end * total
        return recipe.sparsity_penalty if inside else 0.0

    def _update(self, result: StepResult) -> None:
        """Scale the rates, step the optimizers, lift biases."""
        if not math.isfinite(result.norm):
            raise TrainingStopped(
                f"step {self.step + 1}: the gradient's norm is {result.norm}; stopped before this update"
            )
        factor = self.learning_rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * factor
            optimizer.step()
        self._drop_gradients()
        recipe = self.recipe
        if self.sparsity_penalty() and recipe.sparsity_lift and recipe.sparsity_target < 1:
            self._lift(
                lifts(result.active, recipe.sparsity_target), recipe.sparsity_lift * recipe.optimizer.vector_lr * factor
            )

    @torch.no_grad()
    def _lift(self, rises: Tensor, rate: float) -> None:
        biases = self._up_biases
        if not biases:  # frozen under adapters
            return
        own = [
            own_part(rise, bias) if isinstance(bias, DTensor) else rise
            for bias, rise in zip(biases, rises, strict=True)
        ]
        here = [bias.to_local() if isinstance(bias, DTensor) else bias for bias in biases]
        torch._foreach_add_(here, own, alpha=rate)

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def train_step(self, signal: int = 0, save: bool = False) -> dict[str, Any]:
        """Run one step; returns its row of the metrics."""
        return self._train_step(signal, save)[0]

    def _train_step(self, signal: int, save: bool) -> tuple[dict[str, Any], StepResult]:
        started = time.perf_counter()
        result = self._passes.run(self.step, signal, save, self.sparsity_penalty())
        factor = self.learning_rate_factor()
        row: dict[str, Any] = {}
        if self._is_spike(result.loss):
            self._drop_gradients()
            row["skipped"] = self._skipped
        else:
            self._update(result)
            row["grad_norm"] = round(result.norm, 4)
        tokens = self.source.rows(self.step) * self.source.row_length(self.step)
        self.step += 1
        self.tokens_seen += tokens
        seconds = time.perf_counter() - started
        row = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "of_tokens": self._tokens_total,
            "loss": result.loss,
            "lr_factor": round(factor, 6),
            **row,
            **self._meter.measure(tokens, result.squared_lengths, seconds, self._tokens_total - self.tokens_seen),
            "zeros": [round(share, 4) for share in result.zeros],
            "silent": result.silent,
            "loss_by_position": result.by_position,
        }
        return row, result

    def _is_spike(self, loss: float) -> bool:
        """Whether the step's update is to be left out; raises TrainingStopped where the recipe wants that."""
        mean = self._running_loss
        if math.isfinite(loss) and (mean is None or loss <= mean + self.recipe.max_loss_jump):
            self._running_loss = loss if mean is None else 0.98 * mean + 0.02 * loss
            self._skipped = 0
            return False
        self._skipped += 1
        if self.recipe.on_spike == "skip" and self._skipped <= self.recipe.max_skipped:
            return True
        raise TrainingStopped(
            f"step {self.step + 1}: the loss is {loss:.3f} after a running mean of "
            f"{mean if mean is None else round(mean, 3)}; stopped before this update"
        )

    # -- the run -------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the run's directory, if there is one."""
        state = self.checkpoints.load_newest(self.model, self.optimizers)
        if state is None:
            return False
        self.step, self.tokens_seen = state["step"], state["tokens"]
        self._running_loss, self._skipped = state["running_loss"], state["skipped"]
        return True

    def save(self) -> None:
        """Start writing a checkpoint of the present step; every process takes part."""
        state = {"tokens": self.tokens_seen, "running_loss": self._running_loss, "skipped": self._skipped}
        self.checkpoints.save(self.step, self.model, self.optimizers, state)

    def run(self) -> None:
        """Train until the plan is done; checkpoints by the clock, metrics every `log_every` steps.

        Raises TrainingInterrupted after SIGTERM or SIGINT, once a checkpoint of the last step is written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        saved = time.monotonic()
        with StopSignals() as signals, Tracker(self.directory, self.step, self.world, self.recipe.wandb) as tracker:
            while self.step < self.num_steps:
                due = time.monotonic() - saved > 60 * self.recipe.checkpoint_minutes
                row, result = self._train_step(signals.received, due and self.world.is_main)
                self._look_closer(row)
                if not result.signal and (result.save or self._kept_for_good()) and self.step < self.num_steps:
                    self._save_or_tell(row)
                    saved = time.monotonic()
                if result.signal or self._is_to_be_written(row):
                    tracker.write(row)
                else:
                    tracker.hold(row)
                if self.world.is_main:
                    self._report(row)
                if result.signal and self.step < self.num_steps:
                    self._save_or_tell(row)
                    self.checkpoints.wait()
                    raise TrainingInterrupted(result.signal)
            self._save_or_tell({})
            self.checkpoints.wait()

    def _is_to_be_written(self, row: dict[str, Any]) -> bool:
        rare = {"held_out", "sample", "skipped", "checkpoint_error"}
        return self.step % self.recipe.log_every == 0 or self.step == self.num_steps or not rare.isdisjoint(row)

    def _kept_for_good(self) -> bool:
        return bool(self.recipe.keep_every) and self.step % self.recipe.keep_every == 0

    def _save_or_tell(self, row: dict[str, Any]) -> None:
        """A full disk costs the newest checkpoint, not the run: the row says so, and the next save tries again."""
        try:
            self.save()
        except CheckpointError as error:
            row["checkpoint_error"] = str(error)
            self.save()

    def _look_closer(self, row: dict[str, Any]) -> None:
        """Evaluation and a sample, where they are due; with split weights every process computes, else the main one."""
        every = self.recipe.evaluate_every
        due = self.step == self.num_steps or bool(every and self.step % every == 0)
        if not due or not (self._split or self.world.is_main):
            return
        if self._evaluate is not None:
            row["held_out"] = self._evaluate(self.model)
        if self._sample is not None:
            row["sample"] = self._sample(self.model)
        reshard(self.model)

    def whole_model(self) -> PersimmonModel:
        """The model with whole parameters (every process takes part)."""
        return gather_model(self.model)
