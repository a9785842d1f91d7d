"""The zeros as a metric and as an aim: counts, penalty, lifts."""

from __future__ import annotations

import pytest
import torch

from persimmon.config import preset
from persimmon.model import PersimmonModel
from persimmon.train.sparsity import LayerStatistics, lifts, shares_of_zeros, silent_neurons, up_biases


def active(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows])  # [1, T, F]


def test_the_penalty_pauses_above_the_target() -> None:
    statistics = LayerStatistics(2, target=0.6)
    statistics(0, active([0.0, 0.0], [0.0, 4.0]))  # 75 % zeros: no push
    statistics(1, active([0.0, 2.0], [0.0, 4.0]))  # 50 % zeros: mean 1.5, over two layers
    assert float(statistics.penalty()) == pytest.approx(0.75)


def test_counts_add_up_over_passes_and_give_shares_and_silent_neurons() -> None:
    statistics = LayerStatistics(2, target=1.0)
    for _ in range(2):
        statistics(0, active([0.0, 0.0, 1.0], [0.0, 4.0, 2.0]))
        statistics(1, active([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]))
    counts = statistics.counts()
    assert counts.tolist() == [[0, 2, 4, 4], [4, 4, 4, 4]]
    assert shares_of_zeros(counts).tolist() == [0.5, 0.0]
    assert silent_neurons(counts).tolist() == [1, 0]


def test_lifts_silent_neurons_always_and_layers_by_their_excess() -> None:
    counts = torch.tensor([[0.0, 50.0, 100.0], [1.0, 1.0, 100.0], [0.0, 0.0, 100.0]])  # 75 %, 99 % and 100 % zeros
    rises = lifts(counts, target=0.95)
    assert rises[0].tolist() == pytest.approx([1.0, 0.0])
    assert rises[1].tolist() == pytest.approx([0.8, 0.8])
    assert rises[2].tolist() == pytest.approx([2.0, 2.0])


def test_up_biases_are_those_of_the_up_projections() -> None:
    model = PersimmonModel(preset("test"))
    found = up_biases(model)
    assert len(found) == model.config.num_layers
    assert all(bias.shape == (model.config.intermediate_size,) for bias in found)
