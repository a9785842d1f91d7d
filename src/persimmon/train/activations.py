"""What a forward pass keeps for the backward pass: everything, only what is dear to compute again, or block inputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from persimmon.model import Block, PersimmonModel
from persimmon.train import kernels  # noqa: F401 - registers the operators

_LINEAR = torch.ops.persimmon.linear.default  # of train/kernels.py
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, _LINEAR)


def keep_activations(model: PersimmonModel, choice: str) -> None:
    """Make every block keep what `choice` says (LoopRecipe.activations): the gradients stay the same."""
    if choice == "all":
        return
    for block in model.layers:
        assert isinstance(block, Block)
        contexts: Any = None
        if choice == "selective":
            widest = 3 * model.config.hidden_size
            contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, widest))
        block.forward = functools.partial(_recomputed, block.forward, contexts)  # type: ignore[method-assign]


def _policy(widest: int, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention's results and narrow products; norms, rotary, the wide MLP product and its square come again.

    Attention costs the square of the length, a narrow product much for its few numbers; the MLP's first product is
    as wide as all others together.
    """
    if "attention" in str(op) or "varlen" in str(op):
        return CheckpointPolicy.MUST_SAVE
    if op in _PRODUCTS and _width(op, args) <= widest:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _width(op: Any, args: Any) -> int:
    """Columns of a product: PyTorch's have the right matrix last, ours the weight [out, in] second."""
    return int(args[1].shape[0] if op is _LINEAR else args[-1].shape[-1])


def _recomputed(forward: Any, contexts: Any, x: Any, cos: Any, sin: Any, attend: Any, observe: Any) -> Any:
    first = [True]

    def run(x: Any, cos: Any, sin: Any) -> Any:
        # The observer sees the first run alone. It saves nothing for the backward pass, so that both runs match.
        watch, first[0] = (observe if first[0] else None), False
        return forward(x, cos, sin, attend, watch)

    settings = {"context_fn": contexts} if contexts is not None else {}
    return checkpoint(run, x, cos, sin, use_reentrant=False, **settings)
