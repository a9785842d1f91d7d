"""Cross-entropy of a large vocabulary without keeping its logits.

At 16,384 tokens and 262,144 pieces the float32 logits of one row are 17.2 GB. Here they exist one chunk of rows at a
time: the forward pass computes a chunk's logits, its loss and at once its gradients for the hidden states and
the head, so that the backward pass only scales what is already there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persimmon.errors import InputError

IGNORE = -100
"""Target value that carries no loss (the convention of the field)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; only hidden and weight have one, and only where it is wanted."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int) -> Tensor:
        compute = _product_dtype(hidden)
        sums = torch.promote_types(hidden.dtype, torch.float32)  # float32, or float64 throughout
        head = weight.to(compute)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=sums, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x, kept = hidden[rows].to(compute), targets[rows] != IGNORE
            picked = torch.where(kept, targets[rows], 0)[:, None]
            log_probabilities = (x @ head.t()).to(sums).log_softmax(1)  # [chunk, V]
            total -= (log_probabilities.gather(1, picked)[:, 0] * kept).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = log_probabilities.exp_().scatter_add_(1, picked, -torch.ones_like(picked, dtype=sums))
            grad_logits = grad_logits.mul_((kept * scale)[:, None]).to(compute)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grads = (None if grad is None else grad * grad_output for grad in ctx.saved_tensors)
        return *grads, None, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products with the head: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk: int = 512) -> Tensor:
    """`scale` times the summed cross-entropy in nats of `hidden @ weight.T` against `targets`.

    hidden [M, H], weight [V, H], targets [M] with IGNORE where there is no loss. `scale` is 1 / the number of
    targets that count over all micro-batches and processes of a step. At most `chunk` * V logits exist at a time.
    Under autocast the products run in its dtype, sums and softmax in float32. First derivatives only.
    """
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(f"{k} {list(t.shape)}" for k, t in (("hidden", hidden), ("weight", weight)))
        raise InputError(f"{shapes} and targets {list(targets.shape)} do not fit [M, H], [V, H] and [M]")
    if not torch.is_grad_enabled():  # a Function cannot see it and would make gradients nobody wants
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, chunk)
