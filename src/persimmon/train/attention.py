"""Document attention for training: what the CPU kernels can stand in for, rows shared by processes, and GPU kernels.

Every function here is an `attend` for `PersimmonModel.features` and is held to `model.attend_documents`.

Context parallelism: of each row every process holds two stretches of tokens, one from the front and its mirror image
from the back, so that all have the same causal work. Keys and values are gathered; queries stay. A query sees the keys
of its own document up to its own position, whoever holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from persimmon.errors import InputError
from persimmon.model import Attend, attend_documents, check_boundaries, staged

_QUERIES_AT_ONCE = 1024
"""Queries of a partly visible document per call: bounds the mask to 1,024 x 16,384 flags."""

_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 192
"""What the flash path is taken for: compute capability 8.0 (Ampere), and head dimensions up to 192 that 8 divides. A
careful bound: larger heads were tried nowhere."""


class DocumentAttention:
    """An `attend` for `PersimmonModel.features` that also says what it does, so that a kernel can do it instead."""

    def __init__(self, documents: Sequence[int], num_rows: int, num_tokens: int) -> None:
        check_boundaries(documents, num_rows, num_tokens)
        self.documents = list(documents)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The plain form."""
        return attend_documents(q, k, v, self.documents)


def own_positions(tokens: int, rank: int, size: int) -> Tensor:
    """Indices into a row of the tokens that process `rank` of `size` holds, ascending: two mirrored stretches."""
    if tokens % (2 * size):
        raise InputError(f"a row of {tokens} tokens does not divide into 2 x {size} stretches (parallel.context)")
    part = tokens // (2 * size)
    front, back = rank * part, (2 * size - 1 - rank) * part
    return torch.cat((torch.arange(front, front + part), torch.arange(back, back + part)))


class _GatherTokens(torch.autograd.Function):
    """[B, N, T / size, D] of every process -> [B, N, T, D] in order; the gradient is the sum over processes.

    Own code, because `torch.distributed.nn.functional.all_gather` gives wrong gradients on gloo.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup, order: Tensor) -> Tensor:
        ctx.group, ctx.order, ctx.tokens = group, order, own.shape[2]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        whole = torch.empty_like(torch.cat(parts, 2))
        whole[:, :, order] = torch.cat(parts, 2)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        start = ctx.group.rank() * ctx.tokens
        return gradient[:, :, ctx.order[start : start + ctx.tokens]], None, None


def context_parallel(documents: Sequence[int], tokens: int, group: dist.ProcessGroup) -> Attend:
    """An `attend` for q, k, v [B, N, T / size, D] of `own_positions`; `documents` are offsets over whole rows."""
    size = group.size()
    order = torch.cat([own_positions(tokens, rank, size) for rank in range(size)])
    mine = own_positions(tokens, group.rank(), size)
    part = tokens // (2 * size)
    stretches = [(0, int(mine[0]), part), (part, int(mine[part]), part)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One message for both; order moves to the device once per call, it is small.
        both = _GatherTokens.apply(torch.cat((k, v), 1), group, order.to(k.device))
        k, v = both.chunk(2, 1)
        rows = []
        for row in range(len(q)):
            inside = [(a - row * tokens, b - row * tokens) for a, b in pairwise(documents) if a // tokens == row]
            pieces = [
                _attend_stretch(q[row, :, here : here + length], k[row], v[row], start, inside)
                for here, start, length in stretches
            ]
            rows.append(torch.cat(pieces, 1))
        return torch.stack(rows)

    return attend


def _attend_stretch(q: Tensor, k: Tensor, v: Tensor, start: int, documents: list[tuple[int, int]]) -> Tensor:
    """Queries [N, t, D] at positions start .. start + t of a row with keys and values [N, T, D]."""
    stop, pieces = start + q.shape[1], []
    for first, last in documents:
        at, end = max(first, start), min(last, stop)
        while at < end:
            until = end if at == first else min(end, at + _QUERIES_AT_ONCE)
            queries = q[None, :, at - start : until - start]
            keys, values = k[None, :, first:until], v[None, :, first:until]
            if at == first:
                pieces.append(F.scaled_dot_product_attention(queries, keys, values, is_causal=True)[0])
            else:
                positions = torch.arange(first, until, device=q.device)
                mask = positions[None, :] <= positions[at - first :, None]
                pieces.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)[0])
            at = until
    return torch.cat(pieces, 1)


def inside_documents(
    documents: Sequence[int], num_rows: int, num_tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Attend:
    """The best way to attend inside the documents of whole rows, for heads of `head_dim` and products in `dtype`."""
    if device.type == "cuda" and dtype is torch.bfloat16 and _flash_knows(head_dim, device):
        check_boundaries(documents, num_rows, num_tokens)
        return variable_length(documents, device)
    return DocumentAttention(documents, num_rows, num_tokens)


def _flash_knows(head_dim: int, device: torch.device) -> bool:
    """Whether the flash kernels run on a GPU with such heads, backward pass included. They know no float32."""
    if head_dim % 8 or head_dim > _FLASH_HEAD_DIM:
        return False
    return torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def variable_length(documents: Sequence[int], device: torch.device) -> Attend:
    """All documents of a batch in one call of PyTorch's variable-length flash attention (GPU only)."""
    offsets = staged(torch.tensor(documents, dtype=torch.int32), device)
    longest = max(b - a for a, b in pairwise(documents))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, tokens, dim = q.shape
        # Under autocast the norms of q and k return float32, which the kernel does not take.
        queries, keys, values = (x.to(v.dtype).transpose(1, 2).reshape(rows * tokens, heads, dim) for x in (q, k, v))
        # The operator behind torch.nn.attention.varlen, whose signature changes from release to release.
        out, *_ = torch.ops.aten._flash_attention_forward(
            queries, keys, values, offsets, offsets, longest, longest, 0.0, True, return_debug_mask=False
        )
        return out.view(rows, tokens, heads, dim).transpose(1, 2)

    return attend
