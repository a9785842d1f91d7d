"""Cross-entropy of a large vocabulary without keeping its logits.

At 16,384 tokens and 262,144 pieces the float32 logits of one row are 17.2 GB. Here they exist one chunk of rows at a
time: the forward pass computes a chunk's logits, its loss and at once its gradients for the hidden states and
the head, so that the backward pass only scales what is already there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from persimmon.errors import InputError
from persimmon.train.kernels import DTYPES, multiplied, product, softmax_gradient_

CHUNK = 512
"""Positions whose logits exist at a time where nothing asks for more."""

_GPU_LOGITS = 1 << 25
"""Numbers in a chunk of logits (128 MiB in float32): its dozen kernels then run longer than starting them takes."""

IGNORE = -100
"""Target value that carries no loss (the convention of the field)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; only hidden and weight have one, and only where it is wanted.

    `fused` lets one kernel turn logits into their gradient, in place, and another multiply.
    With a `group` every process holds consecutive
    rows of the head: maxima, sums and the target's logit are reduced over the group, and so is the gradient of the
    hidden states, which all of them hold.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int, group: Any, fused: bool
    ) -> tuple[Tensor, Tensor]:
        compute, multiply = _product_dtype(hidden), product if fused else multiplied
        sums = torch.promote_types(hidden.dtype, torch.float32)  # float32, or float64 throughout
        head = weight.to(compute)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if ctx.needs_input_grad[1] else None
        losses = torch.zeros(len(hidden), dtype=sums, device=hidden.device)
        first = group.rank() * len(weight) if group is not None else 0
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows].to(compute)
            logits = multiply(x, head.t())  # [chunk, V]
            if fused:
                losses[rows] = softmax_gradient_(logits, targets[rows], scale, IGNORE)
            else:
                probabilities, losses[rows], picked, here = _probabilities(logits, sums, targets[rows], first, group)
                if grad_hidden is None and grad_weight is None:
                    continue
                probabilities.scatter_add_(1, picked, -here[:, None].to(sums))
                kept = (targets[rows] != IGNORE).to(sums)[:, None]
                torch.mul(probabilities, kept * scale, out=logits)
            # From here on `logits` holds their gradient.
            if grad_hidden is not None:
                grad_hidden[rows] = multiply(logits, head).to(hidden.dtype)
            if grad_weight is not None:
                multiply(logits.t(), x, grad_weight)
        if group is not None and grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> Any:
        grads = (None if grad is None else grad * grad_output for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _probabilities(
    logits: Tensor, sums: torch.dtype, targets: Tensor, first: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax and losses of a chunk in dtype `sums`; of each row its target's column and whether it is held here."""
    kept = targets != IGNORE
    wanted = torch.where(kept, targets, first) - first
    if group is None:
        picked = wanted[:, None]
        return *_softmax(logits, sums, picked, kept), picked, torch.ones_like(kept)
    here = (wanted >= 0) & (wanted < logits.shape[1])
    picked = torch.where(here, wanted, 0)[:, None]
    return *_split_softmax(logits.to(sums), picked, here, kept, group), picked, here


def _softmax(logits: Tensor, sums: torch.dtype, picked: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [chunk, V] (in the memory of the logits' logarithms) and the loss of each row."""
    logarithms = logits.log_softmax(1, dtype=sums)
    losses = -logarithms.gather(1, picked)[:, 0] * kept
    return logarithms.exp_(), losses


def _split_softmax(
    logits: Tensor, picked: Tensor, here: Tensor, kept: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The same where every process of the group holds some columns; `here`: the target is one of them."""
    peak = logits.amax(1)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shifted = logits.sub_(peak[:, None])
    target = shifted.gather(1, picked)[:, 0] * here
    probabilities = shifted.exp_()
    both = torch.stack((probabilities.sum(1), target))
    dist.all_reduce(both, group=group)
    total, target = both
    return probabilities.div_(total[:, None]), (total.log() - target) * kept


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products with the head: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk: int | None = None, fused: bool = False
) -> Tensor:
    """`scale` times the summed cross-entropy in nats of `hidden @ weight.T` against `targets`.

    hidden [M, H], weight [V, H], targets [M] with IGNORE where there is no loss. `scale` is 1 / the number of
    targets that count over all micro-batches and processes of a step. At most `chunk` * V logits exist at a time
    (default: `chunk_for`). Under autocast the products run in its dtype, sums and softmax in float32. A weight that
    tensor parallelism splits by rows is used where it lies. First derivatives only. `fused`: softmax and its gradient
    by the CPU engine's kernel (train/kernels.py), where it knows the tensors.
    """
    return cross_entropy_by_position(hidden, weight, targets, scale=scale, chunk=chunk, fused=fused)[0]


def chunk_for(device: torch.device, vocabulary: int) -> int:
    """Rows whose logits are to exist at a time: few on a CPU, whose caches are small, and as many as a GPU needs."""
    return gpu_chunk(vocabulary) if device.type == "cuda" else CHUNK


def gpu_chunk(vocabulary: int) -> int:
    """`chunk_for` on a GPU, which plans of memory count with (memory_plan.py, plan.py)."""
    return max(CHUNK, _GPU_LOGITS // vocabulary)


def cross_entropy_by_position(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk: int | None = None, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """`chunked_cross_entropy`, and the loss in nats [M] of every position by itself, without gradient."""
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(f"{k} {list(t.shape)}" for k, t in (("hidden", hidden), ("weight", weight)))
        raise InputError(f"{shapes} and targets {list(targets.shape)} do not fit [M, H], [V, H] and [M]")
    if not torch.is_grad_enabled():  # a Function cannot see it and would make gradients nobody wants
        hidden, weight = hidden.detach(), weight.detach()
    group = None
    if isinstance(weight, DTensor):
        group, weight = weight.device_mesh.get_group(), weight.to_local()
    wanted = hidden.requires_grad or weight.requires_grad
    fused = fused and wanted and group is None and hidden.device.type == "cpu" and _product_dtype(hidden) in DTYPES
    chunk = chunk or chunk_for(hidden.device, weight.shape[0])
    loss, losses = _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, chunk, group, fused)
    return loss, losses
