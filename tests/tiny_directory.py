"""A complete model directory of a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path

import torch

from persimmon.checkpoints import hub
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer


def write_tiny_directory(directory: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """The `test` preset with random weights and the tiny vocabulary."""
    hub.save_model(tiny_model(**changes), tiny_tokenizer(), directory, dtype=dtype)
    return directory
