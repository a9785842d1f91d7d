"""Zeros after the squared ReLU as a metric and as an aim: the one place that watches and regularises them."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerStatistics:
    """Observer of the MLPs: the share of zeros per layer, and the penalty that keeps it up."""

    def __init__(self, num_layers: int, target: float) -> None:
        self._target = target
        self.penalties: list[Tensor] = []
        self.zeros: list[list[float]] = [[] for _ in range(num_layers)]

    def __call__(self, layer: int, active: Tensor) -> None:
        """Take in relu(pre-activation) [B, T, F] of one layer."""
        zeros = 1.0 - int(torch.count_nonzero(active.detach())) / active.numel()
        self.zeros[layer].append(zeros)
        if zeros < self._target:
            # A sum and a scalar product: the backward pass of mean() divides every element in bfloat16, slowly.
            self.penalties.append(active.sum(dtype=torch.float32) * (1 / active.numel()))

    def penalty(self) -> Tensor:
        """Sum over the layers below the target of their mean activation, with gradient, per layer of the model."""
        return sum(self.penalties, start=torch.zeros(())) / len(self.zeros)

    def shares(self) -> list[float]:
        """Mean share of zeros of every layer over the forward passes so far."""
        return [sum(zeros) / len(zeros) for zeros in self.zeros if zeros]
