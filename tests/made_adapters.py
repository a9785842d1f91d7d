"""Adapters for tests: random ones, attached to tiny models and written as PEFT does."""

from __future__ import annotations

from pathlib import Path

import torch

from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, write_adapter
from persimmon.model import PersimmonModel


def attach_random(model: PersimmonModel, settings: LoraSettings, seed: int = 0) -> None:
    """Adapters whose B is random too, so that they change the model."""
    lora.attach(model, settings, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in lora.adapted_modules(model).values():
        module.lora_B.data = torch.randn(module.lora_B.shape, generator=generator) * 0.2
    model.eval()


def save(model: PersimmonModel, settings: LoraSettings, directory: Path, base: Path) -> Path:
    tensors = {name: hub.as_tensor_data(name, tensor) for name, tensor in lora.adapter_tensors(model).items()}
    write_adapter(directory, settings, tensors, str(base), base)
    return directory


def write_random_adapter(
    base: Path, directory: Path, settings: LoraSettings | None = None, seed: int = 0
) -> PersimmonModel:
    """Write a random adapter of the model in `base`; that model with it, in float32."""
    settings = settings or LoraSettings(rank=4, alpha=8)
    model = hub.load_model(base, dtype=torch.float32)
    attach_random(model, settings, seed)
    save(model, settings, directory, base)
    return model
