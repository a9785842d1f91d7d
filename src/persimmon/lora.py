"""Low-rank adapters (LoRA, Hu et al. 2021) on the reference model: the base is frozen, a few matrices learn beside it.

`attach` puts a `LoraLinear` in the place of every target matrix; PEFT's files are checkpoints/adapters.py's.
Shapes as in model.py, and: r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon.checkpoints.adapters import Adapter, LoraSettings, module_name, open_adapter, tensor_name
from persimmon.checkpoints.hub import map_tensor
from persimmon.errors import InputError
from persimmon.model import PersimmonModel


class LoraLinear(nn.Module):
    """y = base(x) + scale * B A dropout(x); the product with A and B runs in their own type."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        """`base`: any module that maps [.., in] to [.., out]. a [r, in], b [out, r]."""
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in the base's type."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast:  # once, so that base and adapter keep the same tensor for the backward pass
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = self.base(x)
        if not self.enabled:
            return out
        x = F.dropout(x, self.dropout, self.training)
        x = x if autocast else x.to(self.lora_A.dtype)
        low = F.linear(x, self.lora_A)  # [.., r]
        return out + (F.linear(low, self.lora_B) * self.scale).to(out.dtype)


def low_rank_update(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What merging adds to the base's matrix: scale * B A [out, in] in float32."""
    return scale * (b.float() @ a.float())


def attach(model: PersimmonModel, settings: LoraSettings, *, seed: int = 0) -> None:
    """Freeze the model and give it fresh adapters that change nothing yet: A uniform, B zero, both float32.

    A has PEFT's initialisation, uniform in +-1 / sqrt(in).
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(model.config.num_layers):
        for target in settings.targets:
            name = module_name(layer, target)
            rows, columns = _shape(model.get_submodule(name))
            a = torch.rand(settings.rank, columns, generator=generator).mul_(2).sub_(1).div_(columns**0.5)
            _replace(model, name, a, torch.zeros(rows, settings.rank), settings)


def attach_saved(model: PersimmonModel, adapter: Adapter, *, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model and give it the adapters of an opened directory, in `dtype`."""
    model.requires_grad_(False)
    for name, pair in adapter.pairs.items():
        a, b = (map_tensor(tensor).to(dtype, copy=True) for tensor in pair)
        _replace(model, name, a, b, adapter.settings)


def load_adapter(model: PersimmonModel, directory: Path) -> Adapter:
    """Open an adapter's directory for this model and attach it, ready to run. Raises as `open_adapter`."""
    adapter = open_adapter(directory, model.config)
    attach_saved(model, adapter)
    model.eval()
    return adapter


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, plain or packed."""
    if isinstance(module, LoraLinear):
        raise InputError("the model already has an adapter")
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _replace(model: PersimmonModel, name: str, a: Tensor, b: Tensor, settings: LoraSettings) -> None:
    base = model.get_submodule(name)
    _shape(base)
    device = next((p.device for p in base.parameters()), None) or next(base.buffers()).device
    parent, _, child = name.rpartition(".")
    adapted = LoraLinear(base, a.to(device), b.to(device), settings.scale, settings.dropout)
    setattr(model.get_submodule(parent), child, adapted)


def adapted_modules(model: PersimmonModel) -> dict[str, LoraLinear]:
    """The adapters of a model by `module_name`; empty where it has none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_tensors(model: PersimmonModel) -> dict[str, Tensor]:
    """A and B of every adapter by PEFT's names."""
    return {
        tensor_name(name, part): tensor.detach()
        for name, module in adapted_modules(model).items()
        for part, tensor in (("A", module.lora_A), ("B", module.lora_B))
    }


@contextmanager
def adapters_off(model: PersimmonModel) -> Iterator[None]:
    """Run the base alone inside the block."""
    modules = list(adapted_modules(model).values())
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
