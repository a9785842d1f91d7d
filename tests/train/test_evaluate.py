"""Bits per byte: every token counted once, windows change nothing but the context."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persimmon.config import preset
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.evaluate import bits_per_byte, document_bits, windows


@given(length=st.integers(1, 500), window=st.integers(2, 100), context=st.integers(0, 99))
def test_windows_score_every_position_once_with_context(length: int, window: int, context: int) -> None:
    context = min(context, window - 1)
    scored: list[int] = []
    for start, end, first in windows(length, window, context):
        assert start <= first < end <= length and end - start <= window
        assert first - start == min(first, context)
        scored += range(first, end)
    assert scored == list(range(length))


@pytest.fixture
def model() -> PersimmonModel:
    model = PersimmonModel(preset("test"))
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    return model


def test_one_window_equals_the_plain_loss(model: PersimmonModel) -> None:
    ids = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(1))
    nats = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum")
    assert document_bits(model, ids.tolist(), window=64) == pytest.approx(nats.item() / math.log(2), rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model: PersimmonModel, prepared: Path) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer = Tokenizer.load(prepared)
    text = "River stone light."
    tokens = len(tokenizer.encode(text))
    expected = tokens * math.log2(320) / len(text.encode())
    assert bits_per_byte(model, tokenizer, [text, text], window=16) == pytest.approx(expected, rel=1e-5)


def test_cutting_counts_only_the_bytes_that_were_scored(model: PersimmonModel, prepared: Path) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer = Tokenizer.load(prepared)
    text = "River stone light garden window story green walk quiet letter."
    ids = tokenizer.encode(text, bos=True)[:6]
    expected = 5 * math.log2(320) / len(tokenizer.decode(ids[1:]).encode())
    assert bits_per_byte(model, tokenizer, [text], window=16, max_tokens=6) == pytest.approx(expected, rel=1e-5)
