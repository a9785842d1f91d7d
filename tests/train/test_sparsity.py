"""The zeros as a metric and as an aim: counts, penalty, lifts."""

from __future__ import annotations

import pytest
import torch

from persimmon.config import preset
from persimmon.model import PersimmonModel
from persimmon.train.sparsity import LayerStatistics, lift_biases, shares_of_zeros, silent_neurons, up_biases


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
    assert shares_of_zeros(counts) == [0.5, 0.0]
    assert silent_neurons(counts) == [1, 0]


def test_lifts_silent_neurons_always_and_layers_by_their_excess() -> None:
    counts = torch.tensor([[0.0, 50.0, 100.0], [1.0, 1.0, 100.0], [0.0, 0.0, 100.0]])  # 75 %, 99 % and 100 % zeros
    biases = [torch.zeros(2) for _ in counts]
    lift_biases(biases, counts, target=0.95, rate=0.1)
    assert biases[0].tolist() == pytest.approx([0.1, 0.0])
    assert biases[1].tolist() == pytest.approx([0.08, 0.08])
    assert biases[2].tolist() == pytest.approx([0.2, 0.2])


def test_up_biases_are_those_of_the_up_projections() -> None:
    model = PersimmonModel(preset("test"))
    found = up_biases(model)
    assert len(found) == model.config.num_layers
    assert all(bias.shape == (model.config.intermediate_size,) for bias in found)
