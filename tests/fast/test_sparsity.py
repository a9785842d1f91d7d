"""Zeros, overlaps and bytes against counts made by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from persimmon.config import PRESETS
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import cold_bytes, hot_bytes
from persimmon.fast.sparsity import WINDOW, LayerSparsity, measure, savings
from tiny_model import tiny_ids, tiny_model


@torch.inference_mode()
def by_hand(model: torch.nn.Module, windows: list[list[int]]) -> list[LayerSparsity]:
    """Sets of active neurons, token by token."""
    per_layer: list[list[list[set[int]]]] = [[] for _ in range(model.config.num_layers)]
    for window in windows:
        model.features(
            torch.tensor([window]),
            observe=lambda layer, h: per_layer[layer].append([set(row.nonzero()[:, 0].tolist()) for row in h[0]]),
        )
    results = []
    for runs in per_layer:
        sets = [active for run in runs for active in run]
        pairs = [(before, after) for run in runs for before, after in itertools.pairwise(run)]
        zeros = 1 - sum(map(len, sets)) / (len(sets) * model.config.intermediate_size)
        overlap = sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)
        results.append(LayerSparsity(zeros, overlap))
    return results


def test_counts_equal_those_made_by_hand() -> None:
    model = tiny_model()
    ids = tiny_ids(model.config, 1, WINDOW + 40)[0].tolist()
    seen: list[tuple[int, int]] = []
    found = measure(model, ids, lambda done, total: seen.append((done, total)))
    for layer, expected in zip(found, by_hand(model, [ids[:WINDOW], ids[WINDOW:]]), strict=True):
        assert layer.zeros == pytest.approx(expected.zeros) and layer.overlap == pytest.approx(expected.overlap)
    assert seen == [(WINDOW, WINDOW + 40), (WINDOW + 40, WINDOW + 40)]


def test_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        measure(tiny_model(), [])


def test_savings_of_the_8b() -> None:
    """At 90 % zeros: of two bfloat16 matrices half is the down projection; a p44 neuron's cold record is skipped."""
    config = PRESETS["8b"]
    layers = [LayerSparsity(0.9, 0.5)] * config.num_layers
    saved = savings(config, layers)
    matrices = config.num_layers * 2 * config.hidden_size * config.intermediate_size
    assert saved["bfloat16"].dense == 2 * matrices
    assert saved["bfloat16"].skipped == pytest.approx(0.45 * saved["bfloat16"].dense)
    neurons = config.num_layers * config.intermediate_size
    assert saved["p44"].dense == neurons * (hot_bytes(config) + cold_bytes(config))
    assert saved["p44"].skipped == pytest.approx(0.9 * neurons * cold_bytes(config))
