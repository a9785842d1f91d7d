"""Small models whose zeros and logits look like those of a trained one."""

from __future__ import annotations

import torch

from persimmon.config import ModelConfig
from persimmon.model import PersimmonModel


def sparse_model(config: ModelConfig) -> PersimmonModel:
    """Random weights whose logits differ clearly, with about a sixth of the neurons active."""
    generator = torch.Generator().manual_seed(0)
    model = PersimmonModel(config)
    model.initialize(generator, std=0.12, output_std=0.12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name.endswith("dense_h_to_4h.bias"):
                parameter.sub_(1.1)
    return model.to(torch.bfloat16)
