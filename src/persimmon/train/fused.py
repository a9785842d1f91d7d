"""Puts the CPU engine's training kernels into the blocks of a model: `loop.kernels: auto`.

The model stays the plain one of persimmon.model: its parameters, its names and its results up to rounding. Attention
is replaced where the caller's `attend` is `DocumentAttention`, the MLP where its observer, if any, is
`LayerStatistics`, both where tensors are float32 or bfloat16 on the CPU; every linear layer where its tensors are
float32 and the processor has AMX (`kernels.multiplies`). In every other case the plain methods run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from persimmon.model import MLP, Attend, Attention, Block, Observer, PersimmonModel
from persimmon.train import kernels
from persimmon.train.attention import DocumentAttention
from persimmon.train.sparsity import LayerStatistics


def use_kernels(model: PersimmonModel) -> bool:
    """Let the blocks of a model use the kernels; False where they are not built or do not know the model's shape."""
    if not kernels.available() or not kernels.knows_head_dim(model.config.head_dim):
        return False
    for block in model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        attention.forward = functools.partial(_attention, attention, attention.forward)  # type: ignore[method-assign]
        mlp.forward = functools.partial(_mlp, mlp, mlp.forward)  # type: ignore[method-assign]
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.forward = functools.partial(_linear, layer, layer.forward)  # type: ignore[method-assign]
    return True


def in_use(model: PersimmonModel) -> bool:
    """Whether `use_kernels` has changed this model."""
    return any(isinstance(block, Block) and isinstance(block.mlp.forward, functools.partial) for block in model.layers)


def _attention(
    module: Attention, plain: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
) -> Tensor:
    """`Attention.forward`."""
    if not isinstance(attend, DocumentAttention) or not kernels.fits(x):
        return plain(x, cos, sin, attend)
    rows, tokens, _ = x.shape
    fused = module.query_key_value(x).view(rows * tokens, -1, 3, module.head_dim)
    norms, eps = _norms(module)
    cos, sin = (table.expand(rows, tokens, 1, -1).reshape(rows * tokens, -1) for table in (cos, sin))
    out = kernels.document_attention(fused, norms, cos, sin, attend.documents, eps)
    return module.dense(out.view(rows, tokens, -1))


def _linear(module: nn.Linear, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`nn.Linear.forward`."""
    if kernels.multiplies(x.flatten(0, -2), module.weight.t()):
        return kernels.linear(x, module.weight, module.bias)
    return plain(x)


def _norms(module: Attention) -> tuple[list[Tensor], float]:
    q, k = module.q_layernorm, module.k_layernorm
    if not isinstance(q, nn.LayerNorm) or not isinstance(k, nn.LayerNorm):
        return [], 0.0
    return [norm.float() for norm in (q.weight, q.bias, k.weight, k.bias)], q.eps


def _mlp(module: MLP, plain: Callable[..., Tensor], x: Tensor, observe: Observer | None) -> Tensor:
    """`MLP.forward`."""
    if not kernels.fits(x) or not (observe is None or isinstance(observe, LayerStatistics)):
        return plain(x, observe)
    up = module.dense_h_to_4h(x)
    squared, counts, total = kernels.squared_relu(up.view(-1, up.shape[-1]))
    if observe is not None:
        observe.take(module.layer, counts, len(squared), total)
    return module.dense_4h_to_h(squared.view_as(up))
