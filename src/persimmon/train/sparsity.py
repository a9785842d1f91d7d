"""Zeros after the squared ReLU as a metric and as an aim: the one place that watches and regularises them.

Two forces hold a layer near its target share of zeros. Below the target an L1 on relu(pre-activation) pushes
activations down. It alone does not stop there: AdamW gives even a small steady push on a bias its full rate, and a
neuron that is negative for every token gets no gradient that could bring it back, so whole layers die (docs/LOG.md,
2026-11-23). Hence the second force: above the target the biases of a layer are lifted, and those of silent neurons are
lifted always. Both keep no state, so a resumed run repeats them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from persimmon.model import PersimmonModel, staged


class LayerStatistics:
    """Observer of the MLPs: how often each neuron was active, and the penalty that keeps the zeros up."""

    def __init__(self, num_layers: int, target: float, penalize: bool = True) -> None:
        """penalize: whether `penalty` will be asked for; without it nothing is kept for its gradient."""
        self._target, self._penalize = target, penalize
        self.penalties: list[Tensor] = []
        self._active: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._tokens = [0] * num_layers

    def __call__(self, layer: int, active: Tensor) -> None:
        """Take in relu(pre-activation) [B, T, F] of one layer."""
        tokens = active.detach().flatten(0, -2)
        counts = tokens.bool().sum(0, dtype=torch.int32)
        # A sum and, in `take`, a product: the backward pass of mean() divides every element in bfloat16, slowly.
        self.take(layer, counts, len(tokens), active.sum(dtype=torch.float32) if self._penalize else None)

    def take(self, layer: int, counts: Tensor, tokens: int, total: Tensor | None) -> None:
        """The same from what a kernel counted: active tokens of each neuron [F], all tokens, sum of the activations."""
        self._active[layer].append(counts)
        self._tokens[layer] += tokens
        if self._penalize and total is not None:
            size = tokens * len(counts)
            # Decided where the counts are: asking would wait for a GPU.
            too_many = counts.sum() > math.floor((1.0 - self._target) * size)
            self.penalties.append(torch.where(too_many, total, 0.0) * (1 / size))

    def penalty(self) -> Tensor:
        """Sum over the layers below the target of their mean activation, with gradient, per layer of the model."""
        return sum(self.penalties, start=torch.zeros(())) / len(self._active)

    def counts(self) -> Tensor:
        """[layers, F + 1] float: tokens for which each neuron was active so far, and in the last column all tokens."""
        rows = [torch.stack(counts).sum(0) for counts in self._active]
        tokens = staged(torch.tensor(self._tokens, dtype=torch.float32), rows[0].device)
        return torch.cat((torch.stack(rows).float(), tokens[:, None]), dim=1)


def shares_of_zeros(counts: Tensor) -> Tensor:
    """Share of zeros of every layer, from `LayerStatistics.counts` (summed over processes)."""
    return 1 - counts[:, :-1].mean(1) / counts[:, -1]


def silent_neurons(counts: Tensor) -> Tensor:
    """Number of neurons of every layer that no token activated."""
    return (counts[:, :-1] == 0).sum(1)


def up_biases(model: PersimmonModel) -> list[nn.Parameter]:
    """Biases [F] of the up projections, layer by layer; none where the model is frozen."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and name.endswith("mlp.dense_h_to_4h.bias")]


@torch.no_grad()
def lifts(counts: Tensor, target: float) -> Tensor:
    """By how many times the lift's rate every bias of the up projections [layers, F] is to rise.

    A silent neuron is raised by 1; all neurons of a layer above `target` by its excess of zeros, as a share of the room
    above the target. `counts` as from `LayerStatistics.counts`, the same in all processes.
    """
    excess = ((shares_of_zeros(counts).double() - target) / (1 - target)).clamp_(min=0.0)
    return (counts[:, :-1] == 0) + excess[:, None].to(counts.dtype)
