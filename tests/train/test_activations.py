"""Recomputing activations changes what is kept, not the gradients; the observer sees each layer once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from persimmon.config import preset
from persimmon.model import PersimmonModel
from persimmon.train.activations import keep_activations

DOCUMENTS = [0, 7, 32, 40, 64]


def gradients(choice: str) -> tuple[dict[str, Tensor], list[int], int]:
    """Gradients, layers observed in order, and bytes kept by the forward pass."""
    model = PersimmonModel(preset("test", num_layers=3))
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    keep_activations(model, choice)
    seen: list[int] = []
    penalties: list[Tensor] = []
    kept: dict[int, int] = {}

    def observe(layer: int, active: Tensor) -> None:
        seen.append(layer)
        penalties.append(active.sum())

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.features(ids, documents=DOCUMENTS, observe=observe)
    (hidden.square().sum() + 0.1 * sum(penalties)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen, sum(kept.values())


@pytest.mark.parametrize("choice", ["selective", "none"])
def test_gradients_are_equal_and_every_layer_is_seen_once(choice: str) -> None:
    expected, seen, _ = gradients("all")
    found, again, _ = gradients(choice)
    assert seen == again == [0, 1, 2]
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_selective_computes_neither_attention_nor_narrow_products_again() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.products = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            self.attention += "attention" in name and "backward" not in name
            self.products += name.startswith("aten.addmm")
            return func(*args, **(kwargs or {}))

    counts = {}
    for choice in ("all", "selective", "none"):
        model = PersimmonModel(preset("test", num_layers=2))
        keep_activations(model, choice)
        with Count() as count:
            model.features(torch.arange(16)[None], documents=[0, 16]).sum().backward()
        counts[choice] = (count.attention, count.products)
    assert counts["all"] == (2, 8)  # one attention and four biased products a layer
    assert counts["selective"] == (2, 10)  # the wide product once more
    assert counts["none"][0] == 4 and counts["none"][1] >= 14
