"""Kernels run in the interpreter here (interpreter_environment.py); a small model on disk and its packed forms."""

from __future__ import annotations

from pathlib import Path

import interpreter_environment  # noqa: F401  isort: skip - before any kernel is imported

import pytest
import torch

from persimmon.checkpoints.hub import save_model
from persimmon.config import preset
from persimmon.model import PersimmonModel

# Odd sizes on purpose: padded rows, a last segment of neurons that is not full, 32 not dividing the width.
CONFIG = preset("test", hidden_size=80, intermediate_size=150, num_heads=5)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 hub directory with about a sixth of the neurons active."""
    generator = torch.Generator().manual_seed(0)
    model = PersimmonModel(CONFIG)
    model.initialize(generator, std=0.12, output_std=0.12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name.endswith("dense_h_to_4h.bias"):
                parameter.sub_(1.1)
    directory = tmp_path_factory.mktemp("gpu") / "source"
    save_model(model.to(torch.bfloat16), None, directory)
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
