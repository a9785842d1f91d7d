"""Sequences that already hold tokens: the greedy steps behind them are the same whoever takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpu_decoders import cpu_decoder
from persimmon.bench.filling import FILLS, FilledCache, ReadCache, fill
from persimmon.bench.subject import Subject
from persimmon.infer.drawing import MOST_AHEAD
from tiny_model import tiny_model


@pytest.fixture
def subject() -> Subject:
    decoder = cpu_decoder(tiny_model(hidden_size=64, num_heads=4, max_positions=512))
    return Subject("tiny", Path("tiny"), decoder, "float32", "float32", 1)


@pytest.mark.parametrize("steps", [1, 2, MOST_AHEAD, MOST_AHEAD + 1, MOST_AHEAD + 2, 2 * MOST_AHEAD + 5])
def test_bursts_end_where_single_steps_do(steps: int, subject: Subject) -> None:
    bursts, single = (ReadCache(subject, 20, steps, 1) for _ in range(2))
    for _ in range(2):  # and again after going back
        (row,) = bursts.decode([1], steps)
        (expected,) = FilledCache.decode(single, [1], steps)
        assert np.array_equal(row, expected)
        assert bursts._sequences[0].length == 20 + steps
        bursts.rewind(), single.rewind()
        assert bursts._sequences[0].length == 20


@pytest.mark.parametrize("how", FILLS)
def test_several_sequences_decode_side_by_side(how: str, subject: Subject) -> None:
    cache = fill(subject, how, 32, 4, 3)
    rows = cache.decode([1, 2, 3], 4)
    assert len(rows) == 3
    (alone,) = fill(subject, how, 32, 4, 1).decode([1], 4)
    known = np.isfinite(rows[0]) & np.isfinite(alone)
    assert rows[0].argmax() == alone.argmax() and np.array_equal(rows[0][known], alone[known])
    cache.close()
