"""Small models whose zeros and logits look like those of a trained one."""

from __future__ import annotations

import torch

from persimmon.config import ModelConfig, preset
from persimmon.model import PersimmonModel

# Odd sizes on purpose: rows that need padding, a last block of neurons that is not full, a vocabulary over one chunk
# of the two-pass head.
CONFIG = preset("test", hidden_size=96, intermediate_size=600, num_heads=4, vocab_size=4_500)


def sparse_model(config: ModelConfig = CONFIG, seed: int = 0) -> PersimmonModel:
    """Random weights whose logits differ clearly, with about a sixth of the neurons active."""
    generator = torch.Generator().manual_seed(seed)
    model = PersimmonModel(config)
    model.initialize(generator, std=0.12, output_std=0.12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name.endswith("dense_h_to_4h.bias"):
                parameter.sub_(1.1)
    return model.to(torch.bfloat16)
