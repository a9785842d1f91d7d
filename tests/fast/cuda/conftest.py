"""Kernels run in the interpreter here (interpreter_environment.py); a small model on disk and its packed forms."""

from __future__ import annotations

from pathlib import Path

import interpreter_environment  # noqa: F401  isort: skip - before any kernel is imported

import pytest

from made_models import sparse_model
from persimmon.checkpoints.hub import save_model
from persimmon.config import preset

# Odd sizes on purpose: padded rows, a last segment of neurons that is not full, 32 not dividing the width.
CONFIG = preset("test", hidden_size=80, intermediate_size=150, num_heads=5)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 hub directory with about a sixth of the neurons active."""
    directory = tmp_path_factory.mktemp("gpu") / "source"
    save_model(sparse_model(CONFIG), None, directory)
    return directory


@pytest.fixture(scope="session")
def packed(checkpoint: Path) -> dict[str, Path]:
    """The checkpoint in every packed format."""
    pytest.importorskip("persimmon.fast.cpu._native", reason="the packer is part of the CPU engine")
    from persimmon.fast.cpu.quantize import quantize

    directories = {name: checkpoint.with_name(name) for name in ("q8", "q4", "p44")}
    for name, directory in directories.items():
        quantize(checkpoint, directory, name, threads=1)
    return directories
