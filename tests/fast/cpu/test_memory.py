"""Memory is planned before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from persimmon.config import ModelConfig, preset
from persimmon.errors import UnavailableError
from persimmon.fast.cpu import decoder as decoder_module
from persimmon.fast.cpu import memory
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.load import load_decoder

GIB = memory.GIB


def test_the_8b_fits_where_it_is_said_to() -> None:
    config = ModelConfig()
    short = memory.plan_memory(config, FORMATS["p44"], "int8", 2_048)
    long = memory.plan_memory(config, FORMATS["p44"], "int8", 16_384)
    assert short.total < 8.5 * GIB and long.total < 13 * GIB
    assert memory.plan_memory(config, FORMATS["bfloat16"], "float32", 1).weights > 15 * GIB


def test_what_is_missing_is_said() -> None:
    plan = memory.plan_memory(ModelConfig(), FORMATS["p44"], "int8", 16_384)
    memory.check_memory(plan, plan.total)
    with pytest.raises(UnavailableError, match=r"keys and values of 16384 tokens 4\.8.* 4\.0 GiB are free, .* missing"):
        memory.check_memory(plan, 4 * GIB)


def test_loading_is_refused_when_memory_is_short(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: 10_000_000)
    with pytest.raises(UnavailableError, match="not enough memory"):
        load_decoder(packed["q8"])


def test_a_sequence_that_cannot_fit_is_refused(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_decoder(packed["q8"])
    monkeypatch.setattr(decoder_module, "memory_available", lambda: 1_000_000)
    with pytest.raises(UnavailableError, match="keys and values of 16384 tokens need"):
        loaded.new_sequence(16_384)
    loaded.new_sequence(16)


def test_models_of_some_size_have_no_sketch() -> None:
    small, large = preset("mini"), preset("mini", hidden_size=2048, intermediate_size=8192)
    form = FORMATS["bfloat16"]
    plans = [memory.plan_memory(config, form, "float32", 16) for config in (small, large)]
    whole = [memory.plan_memory(config, FORMATS["q8"], "float32", 16) for config in (small, large)]
    rows = small.num_layers * small.intermediate_size + small.vocab_size
    assert plans[0].scratch - whole[0].scratch == rows * (small.hidden_size + 20)
    assert plans[1].scratch == whole[1].scratch
