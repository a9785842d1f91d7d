from __future__ import annotations

from pathlib import Path

import pytest
import torch

from made_checkpoints import made_config, made_model, made_tokenizer
from persimmon.checkpoints.hub import save_model
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return made_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> PersimmonModel:
    """bfloat16, as released."""
    return made_model(made_config(tokenizer), dtype=torch.bfloat16)


@pytest.fixture
def directory(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The model as a directory of its own."""
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"
