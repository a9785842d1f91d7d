"""A step on a GPU beside the same step on the CPU: loss and gradients of a model of the mini's shape.

`pytest -m gpu tests/train/test_gpu.py` on a machine with a GPU; elsewhere it is skipped.
"""

from __future__ import annotations

import pytest
import torch

from made_rows import RandomRows
from persimmon.config import preset
from persimmon.model import PersimmonModel
from persimmon.train.mesh import Layout
from persimmon.train.parallel import World
from persimmon.train.passes import StepPasses
from persimmon.train.settings import LoopRecipe


def step(device: torch.device, dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, on the CPU, of 4 rows of 512 tokens in two passes."""
    model = PersimmonModel(preset("mini"))
    model.initialize(torch.Generator().manual_seed(0))
    recipe = LoopRecipe(dtype=dtype, kernels="plain", micro_tokens=1024)
    result = StepPasses(
        model.to(device), RandomRows(rows=4, length=512), recipe, World(device=device), Layout(), 1
    ).run(0)
    return result.loss, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 5e-5), ("bfloat16", 5e-2)])
def test_loss_and_gradients_are_those_of_the_cpu(dtype: str, limit: float) -> None:
    """`limit`: of the norm of the difference of all gradients, relative to theirs on the CPU in float32."""
    expected_loss, expected = step(torch.device("cpu"), "float32")
    loss, found = step(torch.device("cuda"), dtype)
    assert loss == pytest.approx(expected_loss, rel=limit)
    assert found.keys() == expected.keys()
    difference, whole = (
        torch.cat([gradients[name].flatten() for name in expected])
        for gradients in ({name: found[name] - expected[name] for name in expected}, expected)
    )
    assert float(difference.norm()) < limit * float(whole.norm())
