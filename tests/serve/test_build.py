"""The engine of a server's process: which decoder it gets and how many blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from persimmon.fast.cpu.native_module import why_unavailable
from persimmon.serve.build import BLOCK_SIZE, EngineSettings
from tiny_directory import write_tiny_directory

ENGINES = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(why_unavailable() is not None, reason="not built")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_cache_takes_its_share_of_the_memory(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free, by what a token takes; never more than every running request's whole context."""
    settings = EngineSettings(str(write_tiny_directory(tmp_path)), {"engine": engine, "context": 1024}, max_running=4)
    assert settings().state.blocks == 4 * 1024 // BLOCK_SIZE
    token_bytes = 2 * 2 * 16 * 4  # keys and values, layers, hidden size, float32
    monkeypatch.setattr("persimmon.machine.memory_available", lambda: 2 * 1600 * token_bytes)
    built = settings()
    assert built.name == engine and built.state.blocks == 100


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_are_asked_for_are_there(engine: str, tmp_path: Path) -> None:
    assert EngineSettings(str(write_tiny_directory(tmp_path)), {"engine": engine}, cache_tokens=100)().state.blocks == 7
