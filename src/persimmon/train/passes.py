"""Forward and backward passes of one step: this process's share of rows and tokens, gradients summed over all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from signal import SIGINT, SIGTERM
from typing import Any, Protocol

import torch
from torch import Tensor

from persimmon.errors import ConfigError
from persimmon.model import Attend, PersimmonModel, document_positions
from persimmon.train.attention import context_parallel, own_positions, variable_length
from persimmon.train.loss import IGNORE, cross_entropy_by_position
from persimmon.train.mesh import Layout
from persimmon.train.parallel import World
from persimmon.train.settings import LoopRecipe
from persimmon.train.sparsity import LayerStatistics

BUCKET = 2048
"""Positions per bucket of the loss by position."""


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
class StepResult:
    """What the passes of a step found, over all processes."""

    loss: float
    """Mean in nats per target that counts."""
    active: Tensor
    """Tokens for which each neuron was active, and all tokens (`LayerStatistics.counts`)."""
    by_position: list[float | None]
    """Mean loss of positions 0 .. BUCKET - 1, and so on; None where there was no target."""
    squared_lengths: float
    """Sum over the step's documents of their squared lengths: what causal attention costs."""
    signal: int
    """A signal that some process has received, else 0."""
    save: bool
    """Whether the main process found it time for a checkpoint."""


class StepPasses:
    """Makes the gradients of a step in the parameters of `model`."""

    def __init__(
        self, model: PersimmonModel, source: BatchSource, recipe: LoopRecipe, world: World, layout: Layout
    ) -> None:
        self._model, self._source, self._recipe = model, source, recipe
        self._world, self._layout = world, layout
        self._dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        self._buckets = -(-model.config.max_positions // BUCKET)

    def check(self, rows: int, length: int) -> None:
        """Raise ConfigError unless the rows of a step divide over the processes as the layout needs it."""
        data, context = self._layout.data_size, self._layout.context_size
        if self._layout.mesh is not None and rows % data:
            raise ConfigError(f"{rows} rows per step do not divide over {data} data-parallel processes")
        if context > 1 and length % (2 * context):
            raise ConfigError(f"row_length {length} is not divisible by 2 x parallel.context {context}")

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        mine = range(self._layout.data_rank, self._source.rows(step), self._layout.data_size)
        # All processes of a context group hold part of each row: together they may take that many more.
        tokens = self._recipe.micro_tokens * self._layout.context_size
        size = max(1, tokens // self._source.row_length(step))
        for start in range(0, len(mine), size):
            yield self._source.batch(step, mine[start : start + size])

    def run(self, step: int, signal: int = 0, save: bool = False) -> StepResult:
        """Gradients of the whole step in every process."""
        batches = [self._own(batch) for batch in self._micro_batches(step)]
        copies = self._layout.tensor_size  # processes with the same rows and tokens
        counted = [float(sum(int((targets != IGNORE).sum()) for _, targets, *_ in batches)), float(len(batches))]
        counts = self._world.sum(
            torch.tensor([*counted, float(signal == SIGTERM), float(signal == SIGINT), float(save)])
        ).tolist()
        targets, passes = max(1.0, counts[0] / copies), counts[1] / copies
        statistics = LayerStatistics(self._model.config.num_layers, self._recipe.sparsity_target)
        sums = torch.zeros(2, self._buckets)
        squares = torch.zeros(1)
        for token_ids, wanted, positions, attention, squared in batches:
            with self._autocast():
                statistics.penalties.clear()
                hidden = self._model.features(token_ids, positions=positions, observe=statistics, **attention)
                loss, losses = cross_entropy_by_position(
                    hidden.flatten(0, 1), self._model.lm_head.weight, wanted.flatten(), scale=1 / targets
                )
                if self._recipe.sparsity_penalty:
                    share = self._recipe.sparsity_penalty / passes / copies
                    loss = loss + share * statistics.penalty().to(loss.device)
            loss.backward()
            sums += self._by_bucket(losses, wanted.flatten(), positions.flatten())
            squares += squared
        if not self._splits_weights():
            self._world.sum_gradients(self._model.parameters())
        found = self._world.sum(torch.cat((sums.flatten(), squares))).cpu() / copies
        nats, number = found[:-1].view(2, -1)
        return StepResult(
            loss=float(nats.sum()) / targets,
            active=self._summed(statistics.counts()),
            by_position=[round(float(a / b), 4) if b else None for a, b in zip(nats, number, strict=True)],
            squared_lengths=float(found[-1]),
            signal=SIGTERM if counts[2] else SIGINT if counts[3] else 0,
            save=counts[4] > 0,
        )  # fmt: skip

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

    def _own(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], float]:
        """Ids, targets, positions [B, own tokens], how to attend, and this process's share of squared lengths."""
        rows, tokens = batch.token_ids.shape
        # Documents count from 0: it matters where positions are rounded (rotary_precision bfloat16).
        positions = document_positions(batch.documents, rows, tokens)
        squared = float(sum((b - a) ** 2 for a, b in pairwise(batch.documents))) / self._layout.context_size
        device = self._world.device
        if self._layout.context_size > 1:
            assert self._layout.context_group is not None
            own = own_positions(tokens, self._layout.context_rank, self._layout.context_size)
            attend: Attend = context_parallel(batch.documents, tokens, self._layout.context_group)
            parts = (batch.token_ids[:, own], batch.targets[:, own], positions[:, own])
            return *(part.to(device) for part in parts), {"attend": attend}, squared  # type: ignore[return-value]
        parts = (batch.token_ids, batch.targets, positions)
        if device.type == "cuda" and self._dtype is torch.bfloat16:  # the kernels know no float32
            attend = variable_length(batch.documents, device)
            return *(part.to(device) for part in parts), {"attend": attend}, squared  # type: ignore[return-value]
        return *(part.to(device) for part in parts), {"documents": batch.documents}, squared  # type: ignore[return-value]

    def _by_bucket(self, losses: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """Sums of the losses and numbers of the targets per bucket [2, buckets]."""
        index = torch.div(positions, BUCKET, rounding_mode="floor")
        sums = torch.zeros(2, self._buckets, device=losses.device)
        sums[0].index_add_(0, index, losses.float())
        sums[1].index_add_(0, index, (targets != IGNORE).float())
        return sums.cpu()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        sharded_on_gpu = self._splits_weights() and self._world.device.type == "cuda"  # FSDP2 casts there
        if self._dtype is torch.float32 or sharded_on_gpu:
            return contextlib.nullcontext()
        return torch.autocast(self._world.device.type, dtype=self._dtype)
