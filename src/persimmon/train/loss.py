"""Cross-entropy of a large vocabulary without keeping its logits.

At 16,384 tokens and 262,144 pieces the float32 logits of one row are 17.2 GB. Here they exist one chunk of rows at a
time: the forward pass computes a chunk's logits, its loss and at once its gradients for the hidden states and
the head, so that the backward pass only scales what is already there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target value that carries no loss (the convention of the field)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int) -> Tensor:
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        compute = torch.get_autocast_dtype(hidden.device.type)
        if not torch.is_autocast_enabled(hidden.device.type):
            compute = hidden.dtype
        head = weight.to(compute)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        total = total.to(hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x, target = hidden[rows].to(compute), targets[rows]
            log_probabilities = (x @ head.t()).to(total.dtype).log_softmax(1)  # [chunk, V]
            kept = target != IGNORE
            picked = target.clamp_min(0)[:, None]
            total -= (log_probabilities.gather(1, picked)[:, 0] * kept).sum()
            if grad_hidden is not None and grad_weight is not None:
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, picked, -torch.ones_like(picked, dtype=total.dtype))
                probabilities.mul_((kept * scale)[:, None])
                grad_logits = probabilities.to(compute)
                grad_hidden[rows] = (grad_logits @ head).to(hidden.dtype)
                grad_weight += grad_logits.t() @ x
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, grad_weight * grad_output, None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk: int = 512) -> Tensor:
    """`scale` times the summed cross-entropy in nats of `hidden @ weight.T` against `targets`.

    hidden [M, H], weight [V, H], targets [M] with IGNORE where there is no loss. `scale` is 1 / the number of
    targets that count over all micro-batches and processes of a step. Under autocast the products run in its dtype,
    sums and softmax in float32.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not fit")
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, chunk)
