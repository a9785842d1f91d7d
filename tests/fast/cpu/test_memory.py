"""Memory is planned before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_models import sparse_model
from persimmon.checkpoints import hub
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"vocab_size": 4_096}, {"vocab_size": 4_097}, {"hidden_size": 100, "num_heads": 5, "intermediate_size": 50}],
)
def test_sketches_are_planned_as_they_are_made(changes: dict[str, int], tmp_path: Path) -> None:
    config = preset("test", **({"hidden_size": 96, "num_heads": 4, "vocab_size": 5_000} | changes))
    hub.save_model(sparse_model(config), None, tmp_path / "model")
    decoder = load_decoder(tmp_path / "model")
    planned = memory.planned_sketch_bytes(config, decoder.form)
    assert planned == decoder._model.sketch_bytes > 0
    plans = [memory.plan_memory(config, FORMATS[form], "float32", 16) for form in ("bfloat16", "q8")]
    assert plans[0].scratch - plans[1].scratch == planned


def test_larger_models_have_no_sketch() -> None:
    assert memory.planned_sketch_bytes(preset("mini"), FORMATS["bfloat16"]) == 6 * 1024 * (256 + 20) + 8192 * (160 + 20)
    large = preset("mini", hidden_size=2048, intermediate_size=8192)
    assert memory.planned_sketch_bytes(large, FORMATS["bfloat16"]) == 0
