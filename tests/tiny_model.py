"""Small random models for tests: weights of a scale at which logits differ clearly from token to token."""

from __future__ import annotations

import torch

from persimmon.config import ModelConfig, preset
from persimmon.model import PersimmonModel

torch.set_num_threads(1)  # models this small only wait for each other on more


def tiny_config(**changes: object) -> ModelConfig:
    return preset("test", **changes)


def tiny_model(seed: int = 0, **changes: object) -> PersimmonModel:
    """A `test` model (or near it) whose biases and norms are random too, so that no term can be dropped unseen."""
    model = PersimmonModel(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator, std=0.3, output_std=0.3, head_std=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tiny_ids(config: ModelConfig, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, tokens] of the vocabulary."""
    return torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
