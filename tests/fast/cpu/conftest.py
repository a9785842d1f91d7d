"""A small trained-looking checkpoint on disk, and its packed forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_models import sparse_model
from persimmon.checkpoints.hub import save_model
from persimmon.config import preset
from persimmon.fast.cpu.quantize import quantize

# Odd sizes on purpose: rows that need padding, a last block of neurons that is not full, a vocabulary over one chunk
# of the two-pass head.
CONFIG = preset("test", hidden_size=96, intermediate_size=600, num_heads=4, vocab_size=4_500)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 hub directory."""
    directory = tmp_path_factory.mktemp("models") / "source"
    save_model(sparse_model(CONFIG), None, directory)
    return directory


@pytest.fixture(scope="session")
def packed(checkpoint: Path) -> dict[str, Path]:
    """The checkpoint in every packed format."""
    directories = {name: checkpoint.with_name(name) for name in ("q8", "q4", "p44")}
    for name, directory in directories.items():
        quantize(checkpoint, directory, name, threads=2)
    return directories
