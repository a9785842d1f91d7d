"""AdamW with decay only where it belongs, and Muon for the matrices of the blocks.

Muon (Keller Jordan, 2024, `KellerJordan/Muon`) replaces a matrix's momentum by the nearest orthogonal matrix, found
with a few Newton-Schulz steps, so that every direction of the update has the same size. The fused query-key-value
matrix is three matrices for this purpose and is taken apart first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel
from persimmon.train.adamw8bit import AdamW8bit
from persimmon.train.mesh import own_part, whole

# Quintic iteration coefficients of the Muon reference: fast, to a singular value of about 0.7-1.2.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

_TOGETHER = 1 << 24
"""Numbers of the matrices that are orthogonalised at once (64 MiB in float32), or one larger matrix: all 12 of a shape
of the mini, 7 of a 125m. Five tensors of this size exist, less than the backward pass took (memory_plan.py)."""

Updates = list[tuple["MatrixParameter", Tensor]]
"""Matrices, each with a gradient or an update of its shape."""


@dataclass(frozen=True)
class MatrixParameter:
    """A block matrix, and (heads, head_dim) when its rows are a fused [heads, 3, head_dim]."""

    parameter: nn.Parameter
    fused_heads: tuple[int, int] | None = None

    def split(self, update: Tensor) -> Tensor:
        """[rows, cols] -> [parts, rows / parts, cols]."""
        if self.fused_heads is None:
            return update[None]
        heads, dim = self.fused_heads
        return update.view(heads, 3, dim, -1).transpose(0, 1).reshape(3, heads * dim, -1)

    @property
    def part_shape(self) -> tuple[int, int]:
        """[rows, cols] of each part."""
        rows, columns = self.parameter.shape
        return rows if self.fused_heads is None else rows // 3, columns

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.fused_heads is None:
            return parts[0]
        heads, dim = self.fused_heads
        return parts.view(3, heads, dim, -1).transpose(0, 1).reshape(self.parameter.shape)


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly orthogonal matrices [K, rows, cols] with the same singular directions, rows <= cols.

    Five steps bring every singular value above 0.3 % of the Frobenius norm into 0.68 .. 1.21; smaller ones grow by up
    to 485 times. The iteration corrects its own rounding, so `dtype` may be bfloat16.
    """
    a, b, c = _NEWTON_SCHULZ
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole_like(update: Tensor) -> Tensor:
    """Memory for the whole of a tensor that is split over processes."""
    return torch.empty(update.shape, dtype=update.dtype, device=update.device)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum. `lr` is the spectral size of one update of a square matrix."""

    def __init__(
        self,
        matrices: Iterable[MatrixParameter],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._matrices = list(matrices)
        self._dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([m.parameter for m in self._matrices], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of equal shape are orthogonalised together and moved before the next ones' turn."""
        group = self.param_groups[0]
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        matrices = [matrix for matrix in self._matrices if matrix.parameter.grad is not None]
        if not matrices:
            return
        # One call for all matrices: on a GPU many small ones cost more to start than to run.
        gradients = [cast(Tensor, matrix.parameter.grad) for matrix in matrices]
        averages = [self._momentum(matrix.parameter) for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        own: Updates = []
        shared: Updates = []
        for matrix, gradient in zip(matrices, gradients, strict=True):
            (shared if isinstance(matrix.parameter, DTensor) else own).append((matrix, gradient))
        for steps in itertools.chain(self._orthogonalized_alike(own), self._orthogonalized_in_turn(shared)):
            parameters = [_local(matrix.parameter) for matrix, _ in steps]
            torch._foreach_mul_(parameters, 1 - lr * decay)
            torch._foreach_add_(parameters, [step for _, step in steps], alpha=-lr)
            steps.clear()

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"]
        return average

    def _nesterov(self, some: Updates) -> Updates:
        """Momentum looked ahead: each gradient moved towards its average, in new memory."""
        averages = [self._momentum(matrix.parameter) for matrix, _ in some]
        updates = torch._foreach_lerp([gradient for _, gradient in some], averages, self.param_groups[0]["momentum"])
        return [(matrix, update) for (matrix, _), update in zip(some, updates, strict=True)]

    def _orthogonalized_alike(self, own: Updates) -> Iterator[Updates]:
        """Scaled updates of whole matrices; those of equal shape are made together, up to `_TOGETHER` numbers."""
        batches: dict[tuple[int, int], list[Updates]] = {}
        for matrix, gradient in own:
            short, long = sorted(matrix.part_shape)
            alike = batches.setdefault((short, long), [[]])
            if sum(one.numel() for _, one in alike[-1]) + gradient.numel() > _TOGETHER and alike[-1]:
                alike.append([])
            alike[-1].append((matrix, gradient))
        for batch in itertools.chain.from_iterable(batches.values()):
            yield self._orthogonalized(batch)

    def _orthogonalized(self, batch: Updates) -> Updates:
        """Scaled updates of whole matrices whose parts all have one shape, on its side or not."""
        split = [matrix.split(update) for matrix, update in self._nesterov(batch)]
        tall = [parts.shape[1] > parts.shape[2] for parts in split]
        wide = [parts.mT if on_end else parts for parts, on_end in zip(split, tall, strict=True)]
        together = orthogonalize(torch.cat(wide), dtype=self._dtype)
        # A tall matrix moves its outputs as far as a square one when scaled by sqrt(rows / cols).
        scale = (together.shape[2] / together.shape[1]) ** 0.5
        updates = together.split([len(parts) for parts in split])
        return [
            (matrix, matrix.join(update.mT * scale if on_end else update))
            for (matrix, _), update, on_end in zip(batch, updates, tall, strict=True)
        ]

    def _orthogonalized_in_turn(self, shared: Updates) -> Iterator[Updates]:
        """This process's part of the scaled updates of matrices that are split over processes.

        Every process takes part. Each matrix is gathered whole, and kept by one process in turn, which orthogonalises
        it and sends the result to the others: the work is divided, the mathematics is that of one process, and each
        holds two whole matrices, its own and the one that arrives.
        """
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for start in range(0, len(shared), size):
            turn = self._nesterov(shared[start : start + size])
            mine: Tensor | None = None
            for owner, (_, update) in enumerate(turn):
                full = whole(update)
                mine = full if owner == rank else mine
            if mine is not None:  # after the last one is gathered: all processes do this at the same time
                mine = self._scaled_update(turn[rank][0], mine).contiguous()
            for owner, (matrix, update) in enumerate(turn):
                assert isinstance(matrix.parameter, DTensor)
                full = mine if mine is not None and owner == rank else _whole_like(update)
                if size > 1:
                    dist.broadcast(full, src=owner)
                yield [(matrix, own_part(full, matrix.parameter))]

    def _scaled_update(self, matrix: MatrixParameter, full: Tensor) -> Tensor:
        parts = matrix.split(full)
        scale = max(1.0, parts.shape[1] / parts.shape[2]) ** 0.5
        tall = parts.shape[1] > parts.shape[2]
        update = orthogonalize(parts.mT if tall else parts, dtype=self._dtype)
        return matrix.join(update.mT if tall else update) * scale


@dataclass(frozen=True)
class OptimizerRecipe:
    """Learning rates at the top of the schedule, and decay."""

    matrices: str = "muon"
    """`muon` or `adamw` for the matrices of the blocks."""
    matrix_lr: float = 0.02
    vector_lr: float = 8e-3
    """AdamW rate of embedding, head, norms and biases."""
    weight_decay: float = 0.1
    """Decoupled decay of the block matrices; nothing else decays."""
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    state: str = "float32"
    """Moments in `float32`, or in `int8` (AdamW only): a quarter of the memory (adamw8bit.py)."""

    def __post_init__(self) -> None:
        if self.matrices not in ("muon", "adamw"):
            raise ConfigError(f"optimizer.matrices must be muon or adamw, got {self.matrices!r}")
        if self.state not in ("float32", "int8"):
            raise ConfigError(f"optimizer.state must be float32 or int8, got {self.state!r}")
        if self.state == "int8" and self.matrices != "adamw":
            raise ConfigError("optimizer.state int8 needs optimizer.matrices adamw")
        for name in ("matrix_lr", "vector_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name} must be positive, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optimizer.weight_decay must not be negative, got {self.weight_decay}")


def build_optimizers(
    model: PersimmonModel, recipe: OptimizerRecipe, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of what trains in a model; each group remembers its top rate as `top_lr`."""
    config = model.config
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 2 and name.startswith("layers."):
            fused = (config.num_heads, config.head_dim) if "query_key_value" in name else None
            matrices.append(MatrixParameter(parameter, fused))
        else:
            vectors.append(parameter)
    betas = (recipe.beta1, recipe.beta2)
    groups: list[dict[str, Any]] = [{"params": vectors, "lr": recipe.vector_lr, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.matrices == "muon":
        optimizers.append(
            Muon(
                matrices,
                recipe.matrix_lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                dtype=dtype,
            )
        )
    else:
        parameters = [matrix.parameter for matrix in matrices]
        groups.append({"params": parameters, "lr": recipe.matrix_lr, "weight_decay": recipe.weight_decay})
    if recipe.state == "int8":
        optimizers.append(AdamW8bit(groups, betas=betas))
    else:
        optimizers.append(torch.optim.AdamW(groups, betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["top_lr"] = group["lr"]
    return optimizers
