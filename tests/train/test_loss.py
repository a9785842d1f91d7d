"""Chunked cross-entropy against F.cross_entropy: values, gradients, and what it must not allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persimmon.errors import InputError
from persimmon.train.loss import IGNORE, chunked_cross_entropy


def made_case(
    positions: int, width: int, pieces: int, ignored: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [M, H], weight [V, H] with gradients, targets [M] with a share of IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(pieces, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(pieces, (positions,), generator=generator)
    targets[torch.rand(positions, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum", ignore_index=IGNORE) * scale


cases = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]))


@given(case=cases, chunk=st.integers(1, 80), scale=st.floats(0.01, 2.0))
def test_value_and_gradients_in_float32(case: tuple[int, int, int, float], chunk: int, scale: float) -> None:
    results = []
    for loss in (
        lambda *args: chunked_cross_entropy(*args, scale=scale, chunk=chunk),
        lambda *args: plain(*args, scale),
    ):
        hidden, weight, targets = made_case(*case)
        value = loss(hidden, weight, targets)
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_float64_gradients_pass_finite_differences(chunk: int) -> None:
    hidden, weight, targets = made_case(7, 5, 11, 0.3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, scale=0.3, chunk=chunk), (hidden, weight)
    )


def test_the_chunk_size_does_not_matter() -> None:
    hidden, weight, targets = made_case(50, 8, 30, 0.2, torch.float64)
    values = [chunked_cross_entropy(hidden, weight, targets, scale=0.1, chunk=chunk) for chunk in (1, 7, 50, 999)]
    for value in values:
        torch.testing.assert_close(value, values[0], atol=1e-12, rtol=0)
        assert value.dtype is torch.float64


def test_autocast_rounds_products_and_nothing_else() -> None:
    """bfloat16 logits carry 8 bits: 0.4 % each; the loss averages that out, gradients keep it."""
    hidden, weight, targets = made_case(300, 32, 50, 0.2)
    exact = plain(hidden, weight, targets, 1 / 240)
    exact.backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, targets, scale=1 / 240, chunk=64)
    found.backward()
    assert found.dtype is torch.float32
    assert float((found - exact).detach().abs()) < 2e-3 * float(exact.detach())
    for gradient, reference in zip((hidden.grad, weight.grad), expected, strict=True):
        assert gradient is not None and reference is not None
        assert gradient.dtype is torch.float32
        assert float((gradient - reference).norm()) < 0.02 * float(reference.norm())


def test_a_bfloat16_model_gets_bfloat16_gradients_of_a_float32_loss() -> None:
    hidden, weight, targets = made_case(100, 16, 40, 0.0, torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, targets, scale=0.01, chunk=16)
    loss.backward()
    assert loss.dtype is torch.float32
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype is weight.grad.dtype is torch.bfloat16
    torch.testing.assert_close(loss.detach(), plain(hidden, weight, targets, 0.01).detach(), rtol=1e-5, atol=0)


def test_ignored_targets_give_nothing() -> None:
    hidden, weight, targets = made_case(20, 4, 9, 0.5)
    loss = chunked_cross_entropy(hidden, weight, targets, scale=1.0, chunk=6)
    loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(1) > 0, targets != IGNORE)
    nothing = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), scale=1.0)
    assert float(nothing.detach()) == 0.0


@pytest.mark.parametrize("target", [-1, 9, -101])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    hidden, weight, targets = made_case(20, 4, 9, 0.5)
    targets[3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, weight, targets, scale=1.0)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"), [((2, 3, 4), (5, 4), (6,)), ((6, 4), (5, 3), (6,)), ((6, 4), (5, 4), (5,))]
)
def test_shapes_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="do not fit"):
        chunked_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets).long(), scale=1.0)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = made_case(5, 4, 9, 0.0)
    loss = chunked_cross_entropy(hidden, weight, targets, scale=1.0).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_the_logits_of_all_positions_never_exist() -> None:
    positions, width, pieces, chunk = 4096, 8, 500, 64
    hidden, weight, targets = made_case(positions, width, pieces, 0.1)
    with Watch() as watch:
        chunked_cross_entropy(hidden, weight, targets, scale=1.0, chunk=chunk).backward()
    assert watch.products == 3 * positions // chunk
    assert watch.largest == max(chunk * pieces, positions * width, pieces * width)
    with Watch() as watch:
        plain(hidden, weight, targets, 1.0)
    assert watch.largest == positions * pieces  # the watch does see such a tensor


def test_gradients_nobody_wants_are_not_made() -> None:
    hidden, weight, targets = made_case(256, 8, 50, 0.1)
    with torch.no_grad(), Watch() as watch:
        chunked_cross_entropy(hidden, weight, targets, scale=1.0, chunk=64)
    assert watch.products == 4
    with Watch() as watch:
        chunked_cross_entropy(hidden, weight.detach(), targets, scale=1.0, chunk=64).backward()
    assert watch.products == 8
    assert hidden.grad is not None and weight.grad is None
