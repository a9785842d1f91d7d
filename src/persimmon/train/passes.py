"""Forward and backward passes of one step: this process's share of rows and tokens, gradients summed over all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from signal import SIGINT, SIGTERM
from typing import Any, Protocol

import torch
from torch import Tensor

from persimmon.errors import ConfigError
from persimmon.model import Attend, Observer, PersimmonModel, document_positions, staged
from persimmon.train.attention import context_parallel, inside_documents, own_positions
from persimmon.train.fused import in_use
from persimmon.train.loss import IGNORE, cross_entropy_by_position
from persimmon.train.mesh import Layout, clip_gradients
from persimmon.train.objective import Objective
from persimmon.train.parallel import World
from persimmon.train.settings import LoopRecipe
from persimmon.train.sparsity import LayerStatistics, shares_of_zeros, silent_neurons
from persimmon.train.transfer import Ahead

BUCKET = 2048
"""Positions per bucket of the loss by position."""


@dataclass(frozen=True)
class Batch:
    """Rows of one step: ids and targets [B, T], and the document offsets over the B * T flattened positions."""

    token_ids: Tensor
    targets: Tensor
    documents: list[int]
    seeds: tuple[int, ...] = ()
    """One per row where the objective draws random numbers."""


class BatchSource(Protocol):
    """Where a step's rows come from."""

    def rows(self, step: int) -> int:
        """Number of rows of the step."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Those rows (numbered 0 .. rows(step) - 1) of the step."""

    def row_length(self, step: int) -> int:
        """Tokens of each row of the step."""


@dataclass(frozen=True)
class StepResult:
    """What the passes of a step found, over all processes."""

    loss: float
    """Mean in nats per target that counts."""
    norm: float
    """Of the whole gradient, before it was clipped."""
    active: Tensor
    """Tokens for which each neuron was active, and all tokens (`LayerStatistics.counts`); where the model is."""
    zeros: list[float]
    """Share of zeros of every layer."""
    silent: list[int]
    """Neurons of every layer that no token activated."""
    by_position: list[float | None]
    """Mean loss of positions 0 .. BUCKET - 1, and so on; None where there was no target."""
    squared_lengths: float
    """Sum over the step's documents of their squared lengths: what causal attention costs."""
    signal: int
    """A signal that some process has received, else 0."""
    save: bool
    """Whether the main process found it time for a checkpoint."""


@dataclass(frozen=True)
class Pass:
    """One forward pass to be: how many terms its loss has, and the loss itself."""

    terms: int
    squared_lengths: float
    """This process's share of the batch's squared document lengths."""
    loss: Callable[[float, Observer], tuple[Tensor, Tensor]]
    """(scale, observer) -> scale times the summed terms, and nats and targets per bucket [2, buckets]."""


def _squared_lengths(batch: Batch) -> float:
    return float(sum((end - start) ** 2 for start, end in pairwise(batch.documents)))


class StepPasses:
    """Makes the gradients of a step in the parameters of `model`."""

    def __init__(
        self,
        model: PersimmonModel,
        source: BatchSource,
        recipe: LoopRecipe,
        world: World,
        layout: Layout,
        num_steps: int,
        objective: Objective | None = None,
    ) -> None:
        """objective: what is minimised; default the cross-entropy of every target, which alone knows all layouts."""
        if objective is not None and (recipe.parallel.splits_weights or recipe.parallel.context > 1):
            raise ConfigError("fine-tuning shares rows only: parallel.tensor and context must be 1, parallel.shard off")
        self._model, self._source, self._recipe, self._objective = model, source, recipe, objective
        self._world, self._layout = world, layout
        self._dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        self._buckets = -(-model.config.max_positions // BUCKET)
        self._ahead = Ahead(self._batches, num_steps) if world.device.type == "cuda" else None

    def check(self, rows: int, length: int) -> None:
        """Raise ConfigError unless the rows of a step divide over the processes as the layout needs it."""
        data, context = self._layout.data_size, self._layout.context_size
        if rows < data:
            raise ConfigError(f"{rows} rows per step for {data} processes: each needs at least one")
        if self._layout.mesh is not None and rows % data:
            raise ConfigError(f"{rows} rows per step do not divide over {data} data-parallel processes")
        if context > 1 and length % (2 * context):
            raise ConfigError(f"row_length {length} is not divisible by 2 x parallel.context {context}")

    def _batches(self, step: int) -> list[Batch]:
        """This process's rows of a step, a batch for each pass."""
        mine = range(self._layout.data_rank, self._source.rows(step), self._layout.data_size)
        # All processes of a context group hold part of each row: together they may take that many more.
        tokens = self._recipe.micro_tokens * self._layout.context_size
        size = max(1, tokens // self._source.row_length(step))
        return [self._source.batch(step, mine[start : start + size]) for start in range(0, len(mine), size)]

    def run(self, step: int, signal: int = 0, save: bool = False, penalty: float = 0.0) -> StepResult:
        """Clipped gradients of the whole step in every process; `penalty` is the weight of the L1 on activations.

        All numbers of the result come over at once, at the end: the only time that a step waits for a GPU, where one
        process trains.
        """
        batches = self._batches(step) if self._ahead is None else self._ahead.take(step)
        copies = self._layout.tensor_size  # processes with the same rows and tokens
        passes = [self._own(batch) if self._objective is None else self._whole(batch) for batch in batches]
        counted = [float(sum(one.terms for one in passes)), float(len(passes))]
        squared = sum(one.squared_lengths for one in passes)
        counts = self._world.sum(
            torch.tensor([*counted, float(signal == SIGTERM), float(signal == SIGINT), float(save), squared])
        ).tolist()
        terms, number_of_passes = max(1.0, counts[0] / copies), counts[1] / copies
        recipe, num_layers = self._recipe, self._model.config.num_layers
        statistics = LayerStatistics(num_layers, recipe.sparsity_target, bool(penalty))
        found = torch.zeros(2 * self._buckets + 1, device=self._world.device)
        for one in passes:
            with self._autocast():
                statistics.penalties.clear()
                loss, buckets = one.loss(1 / terms, statistics)
                found += torch.cat((buckets.flatten(), loss.detach()[None]))
                if penalty:
                    share = penalty / number_of_passes / copies
                    loss = loss + share * statistics.penalty().to(loss.device)
            loss.backward()
        if not self._splits_weights():
            self._world.sum_gradients(self._model.parameters())
        norm = clip_gradients(self._model.parameters(), recipe.optimizer.clip)
        active, found = self._summed(statistics.counts()), self._world.sum(found) / copies
        values = torch.cat(
            (shares_of_zeros(active), silent_neurons(active).float(), norm[None].float(), found)
        ).tolist()
        nats, number = values[2 * num_layers + 1 : -1][: self._buckets], values[-1 - self._buckets : -1]
        return StepResult(
            loss=values[-1],
            norm=values[2 * num_layers],
            active=active,
            zeros=values[:num_layers],
            silent=[int(silent) for silent in values[num_layers : 2 * num_layers]],
            by_position=[round(a / b, 4) if b else None for a, b in zip(nats, number, strict=True)],
            squared_lengths=counts[5] / copies,
            signal=SIGTERM if counts[2] else SIGINT if counts[3] else 0,
            save=counts[4] > 0,
        )

    def _summed(self, own: Tensor) -> Tensor:
        """Counts [layers, F + 1] over all processes; with tensor parallelism each has some of the neurons."""
        copies = self._layout.tensor_size
        if copies == 1:
            return self._world.sum(own)
        neurons = own.shape[1] - 1
        whole = torch.zeros(len(own), copies * neurons + 1, device=own.device)
        start = self._layout.tensor_rank * neurons
        whole[:, start : start + neurons] = own[:, :-1]
        whole[:, -1] = own[:, -1] / copies
        return self._world.sum(whole)

    def _splits_weights(self) -> bool:
        return self._layout.mesh is not None and self._recipe.parallel.splits_weights

    def _whole(self, batch: Batch) -> Pass:
        """A pass of the objective, which sees whole rows."""
        objective, device = self._objective, self._world.device
        assert objective is not None
        moved = replace(batch, token_ids=staged(batch.token_ids, device), targets=staged(batch.targets, device))

        def loss(scale: float, observe: Observer) -> tuple[Tensor, Tensor]:
            nothing = torch.zeros(2, self._buckets, device=device)
            return objective.loss(self._model, moved, scale, observe), nothing

        return Pass(objective.count(batch), _squared_lengths(batch), loss)

    def _own(self, batch: Batch) -> Pass:
        """A pass of this process's tokens: the cross-entropy of every target, and its sums by position."""
        parts, attend = self._own_tokens(batch)
        token_ids, targets, buckets = (
            staged(part, self._world.device) for part in (parts[0], parts[1], parts[2] // BUCKET)
        )
        fused = in_use(self._model)

        def loss(scale: float, observe: Observer) -> tuple[Tensor, Tensor]:
            hidden = self._model.features(token_ids, positions=parts[2], observe=observe, attend=attend)
            total, losses = cross_entropy_by_position(
                hidden.flatten(0, 1), self._model.lm_head.weight, targets.flatten(), scale=scale, fused=fused
            )
            return total, self._by_bucket(losses, targets.flatten(), buckets.flatten())

        squared = _squared_lengths(batch) / self._layout.context_size
        return Pass(int((parts[1] != IGNORE).sum()), squared, loss)

    def _own_tokens(self, batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], Attend]:
        """Ids, targets and positions [B, own tokens] in the host's memory, and how to attend."""
        rows, tokens = batch.token_ids.shape
        # Documents count from 0: it matters where positions are rounded (rotary_precision bfloat16).
        positions = document_positions(batch.documents, rows, tokens)
        if self._layout.context_size == 1:
            heads = self._model.config.head_dim
            attend = inside_documents(batch.documents, rows, tokens, heads, self._world.device, self._dtype)
            return (batch.token_ids, batch.targets, positions), attend
        assert self._layout.context_group is not None
        own = own_positions(tokens, self._layout.context_rank, self._layout.context_size)
        attend = context_parallel(batch.documents, tokens, self._layout.context_group)
        return (batch.token_ids[:, own], batch.targets[:, own], positions[:, own]), attend

    def _by_bucket(self, losses: Tensor, targets: Tensor, buckets: Tensor) -> Tensor:
        """Sums of the losses and numbers of the targets per bucket [2, buckets]."""
        inside = buckets == torch.arange(self._buckets, device=buckets.device)[:, None]
        both = torch.stack((losses.float(), (targets != IGNORE).float()))
        return torch.where(inside, both[:, None], 0.0).sum(-1)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        sharded_on_gpu = self._splits_weights() and self._world.device.type == "cuda"  # FSDP2 casts there
        if self._dtype is torch.float32 or sharded_on_gpu:
            return contextlib.nullcontext()
        return torch.autocast(self._world.device.type, dtype=self._dtype)
