"""The training loop: a plan of steps, and one step after the other until the plan is done.

Everything random follows from (seed, step), so a run killed at any point and resumed from its last checkpoint
repeats the same losses bit for bit (same number of processes, threads and dtype).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from persimmon.errors import ConfigError, PersimmonError
from persimmon.model import PersimmonModel, document_positions
from persimmon.train.checkpoint import load_newest, save_checkpoint
from persimmon.train.loss import IGNORE, chunked_cross_entropy
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers
from persimmon.train.parallel import World
from persimmon.train.schedule import cosine, warmup_stable_decay
from persimmon.train.sparsity import LayerStatistics, lift_biases, shares_of_zeros, silent_neurons, up_biases


@dataclass(frozen=True)
class Batch:
    """Rows of one step: ids and targets [B, T], and the document offsets over the B * T flattened positions."""

    token_ids: Tensor
    targets: Tensor
    documents: list[int]


class BatchSource(Protocol):
    """Where a step's rows come from."""

    def rows(self, step: int) -> int:
        """Number of rows of the step."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Those rows (numbered 0 .. rows(step) - 1) of the step."""

    def row_length(self, step: int) -> int:
        """Tokens of each row of the step."""


@dataclass(frozen=True)
class ScheduleRecipe:
    """How the learning rates go over the run."""

    kind: str = "stable"
    """`stable`: warm-up, constant, linear decay; `cosine`: warm-up, then half a cosine."""
    warmup: float = 0.02
    """Share of the run's tokens."""
    decay: float = 0.5
    """Share of the run's tokens at its end (`stable` only)."""
    floor: float = 0.0
    """Where the decay ends, as a share of the top rates."""

    def __post_init__(self) -> None:
        if self.kind not in ("stable", "cosine"):
            raise ConfigError(f"schedule.kind must be stable or cosine, got {self.kind!r}")
        self.factor(0.0)

    def factor(self, progress: float) -> float:
        """The multiplier after `progress`, the share of the run's tokens already seen."""
        if self.kind == "cosine":
            return cosine(progress, warmup=self.warmup, floor=self.floor)
        return warmup_stable_decay(progress, warmup=self.warmup, decay=self.decay, floor=self.floor)


@dataclass(frozen=True)
class LoopRecipe:
    """What the loop needs to know beside model and data."""

    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    dtype: str = "float32"
    """Dtype of the matrix products: float32, or bfloat16 (autocast; weights and sums stay float32)."""
    sparsity_penalty: float = 0.0
    """Weight of the mean of relu(pre-activation) over layers, positions and neurons, added to the loss in nats."""
    sparsity_target: float = 1.0
    """Share of zeros at which a layer's penalty pauses and its biases are lifted instead (train/sparsity.py)."""
    sparsity_lift: float = 1.0
    """Size of one lift, as a multiple of the present rate of the vectors."""
    micro_tokens: int = 8192
    """Most tokens of one forward pass of one process."""
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    evaluate_every: int = 250
    """Steps between evaluations on held-out documents; 0: only at the end."""
    max_loss_jump: float = 3.0
    """A step whose loss exceeds the running mean by this many nats, or is not finite, stops the run."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r} (float16 overflows in relu^2)")


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
    ) -> None:
        self.model, self.source, self.num_steps = model, source, num_steps
        self.recipe, self.directory, self.world = recipe, directory, world
        self._evaluate, self._report = evaluate, report
        self._dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        self.optimizers = build_optimizers(model, recipe.optimizer, self._dtype)
        self._tokens_total = sum(source.rows(s) * source.row_length(s) for s in range(num_steps))
        self.step, self.tokens_seen = 0, 0
        self._running_loss: float | None = None

    # -- one step ------------------------------------------------------------------------------------

    def learning_rate_factor(self) -> float:
        """The schedule's multiplier for the coming step."""
        return self.recipe.schedule.factor(self.tokens_seen / self._tokens_total)

    def _micro_batches(self) -> Iterator[Batch]:
        mine = range(self.world.rank, self.source.rows(self.step), self.world.size)
        size = max(1, self.recipe.micro_tokens // self.source.row_length(self.step))
        for start in range(0, len(mine), size):
            yield self.source.batch(self.step, mine[start : start + size])

    def _forward_backward(self) -> tuple[float, Tensor]:
        """Gradients of the whole step in every process; (mean loss in nats per target, counts of active neurons)."""
        batches = list(self._micro_batches())
        counts = torch.tensor([float(sum(int((b.targets != IGNORE).sum()) for b in batches)), float(len(batches))])
        targets, passes = self.world.sum(counts).tolist()
        statistics = LayerStatistics(self.model.config.num_layers, self.recipe.sparsity_target)
        total = torch.zeros(())
        for batch in batches:
            with self._autocast():
                statistics.penalties.clear()
                # Documents count from 0: it matters where positions are rounded (rotary_precision bfloat16).
                positions = document_positions(batch.documents, *batch.token_ids.shape)
                hidden = self.model.features(
                    batch.token_ids, positions=positions, documents=batch.documents, observe=statistics
                )
                loss = chunked_cross_entropy(
                    hidden.flatten(0, 1), self.model.lm_head.weight, batch.targets.flatten(), scale=1 / targets
                )
                total += loss.detach()
                if self.recipe.sparsity_penalty:
                    loss = loss + self.recipe.sparsity_penalty / passes * statistics.penalty()
            loss.backward()
        self.world.sum_gradients(self.model.parameters())
        return float(self.world.sum(total)), self.world.sum(statistics.counts())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self._dtype)

    def _update(self, active: Tensor) -> float:
        """Clip, scale the rates, step the optimizers, lift biases; returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        factor = self.learning_rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recipe = self.recipe
        if recipe.sparsity_penalty and recipe.sparsity_lift and recipe.sparsity_target < 1:
            rate = recipe.sparsity_lift * recipe.optimizer.vector_lr * factor
            lift_biases(up_biases(self.model), active, recipe.sparsity_target, rate)
        return float(norm)

    def train_step(self) -> dict[str, Any]:
        """Run one step; returns its row of the metrics."""
        started = time.perf_counter()
        loss, active = self._forward_backward()
        self._guard(loss)
        factor = self.learning_rate_factor()
        norm = self._update(active)
        tokens = self.source.rows(self.step) * self.source.row_length(self.step)
        self.step += 1
        self.tokens_seen += tokens
        return {
            "step": self.step,
            "tokens": self.tokens_seen,
            "of_tokens": self._tokens_total,
            "loss": loss,
            "lr_factor": round(factor, 6),
            "grad_norm": round(norm, 4),
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
            "zeros": [round(share, 4) for share in shares_of_zeros(active)],
            "silent": silent_neurons(active),
        }

    def _guard(self, loss: float) -> None:
        mean = self._running_loss
        if not math.isfinite(loss) or (mean is not None and loss > mean + self.recipe.max_loss_jump):
            raise TrainingStopped(
                f"step {self.step + 1}: the loss is {loss:.3f} after a running mean of "
                f"{mean if mean is None else round(mean, 3)}; stopped before this update"
            )
        self._running_loss = loss if mean is None else 0.98 * mean + 0.02 * loss

    # -- the run -------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the run's directory, if there is one."""
        state = load_newest(self.directory / "checkpoints", self.model, self.optimizers)
        if state is None:
            return False
        self.step, self.tokens_seen = state["step"], state["tokens"]
        self._running_loss = state["running_loss"]
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step (main process)."""
        if self.world.is_main:
            state = {"tokens": self.tokens_seen, "running_loss": self._running_loss}
            save_checkpoint(
                self.directory / "checkpoints",
                self.step, self.model, self.optimizers, state, self.recipe.keep_checkpoints,
            )  # fmt: skip

    def run(self) -> None:
        """Train until the plan is done; checkpoints by the clock, metrics every step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        saved = time.monotonic()
        with _metrics_file(self.directory, self.step, self.world) as write:
            while self.step < self.num_steps:
                row = self.train_step()
                if self._evaluate is not None and self._evaluation_due():
                    row["held_out"] = self._evaluate(self.model)
                write(row)
                self._report(row)
                if time.monotonic() - saved > 60 * self.recipe.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()

    def _evaluation_due(self) -> bool:
        every = self.recipe.evaluate_every
        return self.world.is_main and (self.step == self.num_steps or bool(every and self.step % every == 0))


@contextlib.contextmanager
def _metrics_file(directory: Path, step: int, world: World) -> Iterator[Callable[[dict[str, Any]], None]]:
    if not world.is_main:
        yield lambda row: None
        return
    truncate_metrics(directory / "metrics.jsonl", step)
    with (directory / "metrics.jsonl").open("a") as stream:

        def write(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        yield write


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step` (and a torn last line), so that a resumed run leaves one row per step."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)
