"""The CPU engine's training kernels as PyTorch operators with gradients; persimmon.train.fused puts them into a model.

Each does in one pass over memory what the plain model (persimmon.model) does in several, keeps less for the backward
pass and is held to the plain form by tests. They take float32 and bfloat16 on the CPU; sums are float32. For the same
inputs and number of threads their results are the same bits every time.

Shapes: M tokens of all rows, N heads, D head_dim, P head_dim padded to whole vectors, F neurons, V vocabulary; of a
linear layer I its inputs and O its outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persimmon.fast.cpu.native_module import native, why_unavailable

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write."""


def available() -> bool:
    """Whether the kernels were built."""
    return why_unavailable() is None


def knows_head_dim(dim: int) -> bool:
    """Whether there are kernels for this head dimension."""
    return bool(native().knows_head_dim(dim))


def fits(x: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return x.device.type == "cpu" and x.dtype in DTYPES


# -- attention: QK LayerNorm, rotary, causal attention inside documents ------------------------------------------


def _packed(fused: Tensor, norms: Sequence[Tensor | None], cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Queries, keys and values [3, N, M, P] float32 after LayerNorm and rotary."""
    module, (tokens, heads, _, dim) = native(), fused.shape
    padded = -(-dim // module.HEAD_VECTOR) * module.HEAD_VECTOR
    packed = torch.empty(3, heads, tokens, padded)
    module.heads_forward(fused, cos, sin, *norms, eps, packed, torch.get_num_threads())
    return packed


@torch.library.custom_op("persimmon::document_attention", mutates_args=())
def _document_attention(
    fused: Tensor, norms: Sequence[Tensor], cos: Tensor, sin: Tensor, documents: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Output [M, N, D] and what the softmax of every query was divided by [N, M], as a power of two."""
    tokens, heads, _, dim = fused.shape
    packed = _packed(fused.detach(), _detached(norms), cos, sin, eps)
    out, normalizer = fused.new_empty(tokens, heads, dim), torch.empty(heads, tokens)
    native().attention_forward(packed, list(documents), out, normalizer, torch.get_num_threads())
    return out, normalizer


def _detached(norms: Sequence[Tensor]) -> list[Tensor | None]:
    return [norm.detach() for norm in norms] if norms else [None] * 4


def _keep_for_attention(ctx: Any, inputs: Any, output: Any) -> None:
    fused, norms, cos, sin, documents, eps = inputs
    ctx.save_for_backward(fused, cos, sin, *output, *norms)
    ctx.documents, ctx.eps = list(documents), eps
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: Tensor, _: Any) -> Any:
    """Queries, keys and values are packed anew: that is cheap, and nothing of their size is kept between the passes."""
    fused, cos, sin, out, normalizer, *norms = ctx.saved_tensors
    module, threads = native(), torch.get_num_threads()
    fused, weights = fused.detach(), _detached(norms)
    packed = _packed(fused, weights, cos, sin, ctx.eps)
    grads = torch.empty_like(packed)
    module.attention_backward(packed, ctx.documents, out, normalizer, grad_out.contiguous(), grads, threads)
    grad_fused = torch.empty_like(fused)
    sums = torch.empty(-(-len(fused) // module.TOKEN_CHUNK), 4, packed.shape[-1])
    module.heads_backward(fused, cos, sin, *weights, ctx.eps, grads, grad_fused, sums, threads)
    grad_norms = list(sums.sum(0)[:, : fused.shape[-1]].contiguous()) if norms else []
    return grad_fused, grad_norms, None, None, None, None


_document_attention.register_autograd(_attention_backward, setup_context=_keep_for_attention)


def document_attention(
    fused: Tensor, norms: Sequence[Tensor], cos: Tensor, sin: Tensor, documents: Sequence[int], eps: float
) -> Tensor:
    """Attention [M, N, D] of the fused projection [M, N, 3, D] inside the documents; first derivatives only.

    Args:
        fused: query, key and value of every head.
        norms: weight and bias [D] of the queries' LayerNorm, then of the keys'; empty: there is none.
        cos: of every token's rotary angles, [M, R / 2] float32.
        sin: likewise.
        documents: offsets 0 .. M, as in `model.attend_documents`.
        eps: of the LayerNorms.
    """
    return _document_attention(fused, list(norms), cos, sin, documents, eps)[0]


# -- products of float32 matrices -----------------------------------------------------------------------------------

_LEAST_SIDE, _LEAST_TERMS = 32, 1 << 26
"""Rows, columns and terms, and multiplications, from which a product pays (measured; docs/LOG.md, 2026-11-26)."""


@functools.cache
def _has_products() -> bool:
    return available() and bool(native().has_matrix_product())


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel multiplies a [M, K] by b [K, N] faster than PyTorch: float32, AMX, and not small."""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype is torch.float32 for x in (a, b))
    on_cpu = a.device.type == b.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    sizes = (a.shape[0], *b.shape)
    return plain and on_cpu and min(sizes) >= _LEAST_SIDE and math.prod(sizes) >= _LEAST_TERMS and _has_products()


def _stored(x: Tensor) -> tuple[Tensor, bool]:
    """A matrix as it lies in memory, and whether x is its transpose."""
    x = x.detach()
    return (x.t(), True) if x.t().is_contiguous() and not x.is_contiguous() else (x.contiguous(), False)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False) -> Tensor:
    (a, a_turned), (b, b_turned) = _stored(a), _stored(b)
    bias = None if bias is None else bias.detach()
    native().matrix_product(a, b, bias, out.detach(), a_turned, b_turned, add, torch.get_num_threads())
    return out


def product(a: Tensor, b: Tensor, add_to: Tensor | None = None) -> Tensor:
    """The product [M, N] of a [M, K] and b [K, N], or `add_to` after adding it there; no gradient."""
    if multiplies(a, b) and (add_to is None or add_to.dtype is torch.float32):
        out = a.new_empty(a.shape[0], b.shape[1]) if add_to is None else add_to
        return _multiply(a, b, out, add=add_to is not None)
    return multiplied(a, b, add_to)


def multiplied(a: Tensor, b: Tensor, add_to: Tensor | None = None) -> Tensor:
    """`product` by PyTorch; without a tensor for a product that is added, where the dtypes allow it."""
    if add_to is None:
        return a @ b
    return add_to.addmm_(a, b) if add_to.dtype == a.dtype else add_to.add_(a @ b)


@torch.library.custom_op("persimmon::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(x, weight.t(), x.new_empty(len(x), len(weight)), bias=bias)


def _keep_for_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(ctx: Any, grad: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_x = product(grad, weight) if wanted[0] else None
    grad_weight = product(grad.t(), x) if wanted[1] else None
    return grad_x, grad_weight, grad.sum(0) if wanted[2] else None


_linear.register_autograd(_linear_backward, setup_context=_keep_for_linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x [.., I] and weight [O, I] by the kernel; first derivatives only."""
    out: Tensor = _linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


# -- the squared ReLU -----------------------------------------------------------------------------------------------


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        module, (tokens, neurons) = native(), x.shape
        chunks = -(-tokens // module.TOKEN_CHUNK)
        y, active, sums = torch.empty_like(x), torch.empty(chunks, neurons, dtype=torch.int32), torch.empty(chunks)
        module.squared_relu(x.detach(), y, active, sums, torch.get_num_threads())
        counts = active.sum(0, dtype=torch.int32)
        ctx.mark_non_differentiable(counts)
        return y, counts, sums.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, _: Any, grad_total: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        # The gradient of y is nobody else's: it comes from the product that follows.
        grad = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
        extra = 0.0 if grad_total is None else float(grad_total)
        native().squared_relu_backward(x.detach(), grad, extra, torch.get_num_threads())
        return grad


def squared_relu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x)^2 [M, F], for how many tokens each neuron was active [F], and the sum of relu(x), with its gradient.

    y must have one reader: the backward pass writes into the gradient that it gets.
    """
    y, counts, total = _SquaredRelu.apply(x)
    return y, counts, total


# -- softmax ----------------------------------------------------------------------------------------------------------


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float, ignore: int) -> Tensor:
    """Turn logits [M, V] in place into `scale` times the gradient of their cross-entropy; losses [M] in nats."""
    losses = torch.empty(len(logits))
    native().softmax_gradient(logits, targets, ignore, scale, losses, torch.get_num_threads())
    return losses
