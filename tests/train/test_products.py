"""Products of float32 matrices on AMX against float64 and PyTorch, and the linear layers that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon.bench.train import RandomRows, TrainWork
from persimmon.config import ModelConfig
from persimmon.model import PersimmonModel
from persimmon.train import kernels
from persimmon.train.activations import keep_activations
from persimmon.train.fused import use_kernels
from persimmon.train.loop import LoopRecipe, Trainer
from persimmon.train.loss import cross_entropy_by_position
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.parallel import World

if not kernels.available():
    pytest.skip("the cpu engine is not built", allow_module_level=True)

from persimmon.fast.cpu.native_module import native

NATIVE: Any = native()
on_amx = pytest.mark.skipif(not NATIVE.has_matrix_product(), reason="this processor has no AMX for bfloat16")


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size take the kernel."""
    monkeypatch.setattr(kernels, "_LEAST_SIDE", 1)
    monkeypatch.setattr(kernels, "_LEAST_TERMS", 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiplied(a: Tensor, b: Tensor, turned: tuple[bool, bool], threads: int = 2, bias: Tensor | None = None) -> Tensor:
    """a b of operands that are stored transposed where `turned` says so."""
    out = torch.full((len(a), b.shape[1]), float("nan"))
    stored = [x.t().contiguous() if t else x.contiguous() for x, t in zip((a, b), turned, strict=True)]
    NATIVE.matrix_product(*stored, bias, out, *turned, False, threads)
    return out


LAYOUTS = [(False, True), (False, False), (True, False), (True, True)]
"""x W^T, g W and g^T x; the last for completeness."""


# -- one product ---------------------------------------------------------------------------------------------------


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "terms", "columns"),
    [
        (1, 1, 1),
        (32, 32, 32),
        (33, 31, 65),
        (7, 300, 5),
        (300, 257, 130),
        (520, 64, 530),
        (70, 1100, 40),
        (20, 8500, 40),
        (33, 130, 26400),
    ],
)
def test_a_product_is_as_exact_as_pytorchs(rows: int, terms: int, columns: int, turned: tuple[bool, bool]) -> None:
    a, b, bias = normal(rows, terms), normal(terms, columns, seed=1), normal(columns, seed=2)
    exact = a.double() @ b.double() + bias.double()
    found, plain = multiplied(a, b, turned, bias=bias), torch.addmm(bias, a, b)
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (found, plain))
    assert error <= 2 * allowed + 6e-8  # half a unit in the last place, where one term is all


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS)
def test_the_product_is_added_to_what_is_there(turned: tuple[bool, bool]) -> None:
    a, b, there = normal(90, 600), normal(600, 50, seed=1), 100 * normal(90, 50, seed=2)
    exact = a.double() @ b.double() + there.double()
    stored = [x.t().contiguous() if t else x for x, t in zip((a, b), turned, strict=True)]
    NATIVE.matrix_product(*stored, None, there, *turned, True, 2)
    assert float((there.double() - exact).norm() / exact.norm()) < 2e-7


def ranges(kind: str) -> tuple[Tensor, Tensor]:
    """Matrices whose numbers differ by many powers of two."""
    a, b = normal(100, 700), normal(700, 60, seed=1)
    powers = torch.linspace(-40, 40, 700)
    if kind == "rows and columns":
        return a * 2.0 ** torch.linspace(-40, 40, 100)[:, None], b * 2.0 ** torch.linspace(40, -40, 60)
    if kind == "terms":
        return a * 2.0**powers, b
    if kind == "terms against each other":
        return a * 2.0**powers, b * 2.0 ** -powers[:, None]
    if kind == "tiny gradients":
        return a * 1e-25, b
    if kind == "cancelling":  # sums a millionth of their terms
        return torch.cat((1000 * a, -1000 * a, a), 1), torch.cat((b, b, b / 1000))
    assert kind == "lowest bits"  # all 24 are needed
    return 1 + a * 2.0**-22, 1 + b * 2.0**-22


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS[:3])
@pytest.mark.parametrize(
    "kind", ["rows and columns", "terms", "terms against each other", "tiny gradients", "cancelling", "lowest bits"]
)
def test_numbers_of_any_size(kind: str, turned: tuple[bool, bool]) -> None:
    """The largest error of a sum, relative to the sum of its terms' magnitudes, is at most twice PyTorch's."""
    a, b = ranges(kind)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    errors = [float(((x.double() - exact).abs() / size).max()) for x in (multiplied(a, b, turned), a @ b)]
    assert errors[0] <= 2 * errors[1] + 2.0**-24, errors


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS[:3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_what_is_no_number_stays_none_and_in_its_row(bad: float, turned: tuple[bool, bool]) -> None:
    """3.4e38 rounds to infinity as bfloat16, and is lost as one is."""
    a, b = normal(70, 300), normal(300, 40, seed=1)
    clean = multiplied(a, b, turned)
    a[33, 290] = bad
    found = multiplied(a, b, turned)
    assert not found[33].isfinite().any()
    keep = torch.arange(70) != 33
    assert torch.equal(found[keep], clean[keep])
    assert not multiplied(b.t().contiguous(), a.t(), turned)[:, 33].isfinite().any()


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS[:3])
def test_denormal_numbers_count_as_zero(turned: tuple[bool, bool]) -> None:
    a, b = torch.full((40, 64), 1e-40), torch.ones(64, 40)
    assert torch.equal(multiplied(a, b, turned), torch.zeros(40, 40))


@on_amx
@pytest.mark.parametrize("turned", LAYOUTS)
def test_bits_depend_neither_on_threads_nor_on_other_rows(turned: tuple[bool, bool]) -> None:
    a, b = normal(700, 530), normal(530, 610, seed=1)
    first = multiplied(a, b, turned, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(multiplied(a, b, turned, threads), first)
    assert torch.equal(multiplied(a[100:250], b[:, 37:90], turned), first[100:250, 37:90])


@on_amx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(5, 8)}, "the shapes of the matrices do not fit"),
        ({"a": torch.zeros(3, 5)}, "the shapes of the matrices do not fit"),
        ({"c": torch.zeros(4, 9)}, "the shapes of the matrices do not fit"),
        ({"bias": torch.zeros(7)}, "the bias has the wrong length"),
        ({"isa": "avx2"}, "no products of matrices"),
    ],
)
def test_shapes_are_checked(change: dict[str, Any], message: str) -> None:
    given = {
        "a": torch.zeros(4, 6), "b": torch.zeros(6, 8), "bias": torch.zeros(8), "c": torch.zeros(4, 8),
        "a_turned": False, "b_turned": False, "add": False, "threads": 1,
    }  # fmt: skip
    NATIVE.matrix_product(**given)
    with pytest.raises(ValueError, match=message):
        NATIVE.matrix_product(**{**given, **change})


# -- linear layers -------------------------------------------------------------------------------------------------


def test_what_the_kernel_takes(every_size: None) -> None:
    a, b = torch.zeros(40, 50), torch.zeros(50, 60)
    here = bool(NATIVE.has_matrix_product())
    assert kernels.multiplies(a, b) == here == kernels.multiplies(a, nn.Parameter(b))
    assert not kernels.multiplies(a.double(), b.double()) and not kernels.multiplies(a.bfloat16(), b)
    assert not kernels.multiplies(a.to("meta"), b.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.multiplies(a, b)


def test_small_products_are_pytorchs() -> None:
    assert not kernels.multiplies(torch.zeros(100, 100), torch.zeros(100, 100))
    assert not kernels.multiplies(torch.zeros(1 << 20, 8), torch.zeros(8, 64))


def gradients(compute: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = compute(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@on_amx
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 2)])
def test_a_linear_layer_and_its_gradients(frozen: tuple[int, ...], every_size: None) -> None:
    inputs = [normal(3, 50, 70), normal(90, 70, seed=1), normal(90, seed=2)]
    for i, x in enumerate(inputs):
        x.requires_grad_(i not in frozen)
    # As the gradient of a sum comes: the same number again and again, without memory of its own.
    for grad in (normal(3, 50, 90, seed=3), torch.ones(1).expand(3, 50, 90)):
        found = gradients(kernels.linear, inputs, grad)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        for a, b in zip(found, gradients(F.linear, exact, grad.double()), strict=True):
            assert float((a.double() - b).norm() / b.norm()) < 3e-7


@on_amx
def test_the_heads_products(every_size: None) -> None:
    hidden, weight = normal(70, 40).requires_grad_(), normal(90, 40, seed=1).requires_grad_()
    targets = torch.randint(90, (70,), generator=torch.Generator().manual_seed(0))

    def loss(hidden: Tensor, weight: Tensor, fused: bool) -> list[Tensor]:
        total, losses = cross_entropy_by_position(hidden, weight, targets, scale=1 / 70, chunk=32, fused=fused)
        return [losses, *torch.autograd.grad(total, (hidden, weight))]

    exact = loss(hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), False)
    for found, wanted in zip(loss(hidden, weight, True), exact, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


# -- a model in training -------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=64, intermediate_size=200, num_layers=2, num_heads=2, bos_token_id=0, eos_token_id=0
)


def made_trainer(folder: Path, **changes: Any) -> Trainer:
    model = PersimmonModel(CONFIG)
    model.initialize(torch.Generator().manual_seed(0), std=0.1)
    recipe = LoopRecipe(optimizer=OptimizerRecipe(matrices="adamw"), **changes)
    return Trainer(model, RandomRows(TrainWork(CONFIG, length=48, rows=2, documents=20)), 3, recipe, folder, World())


@on_amx
def test_training_with_the_products(tmp_path: Path, every_size: None) -> None:
    plain, trainer = made_trainer(tmp_path / "a", kernels="plain"), made_trainer(tmp_path / "b")
    for _ in range(2):
        wanted, found = plain.train_step(), trainer.train_step()
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


@on_amx
@pytest.mark.parametrize("activations", ["all", "selective"])
def test_a_resumed_run_repeats_the_bits(activations: str, tmp_path: Path, every_size: None) -> None:
    whole, first = (made_trainer(tmp_path / name, activations=activations) for name in ("whole", "first"))
    wanted = [whole.train_step()["loss"] for _ in range(3)]
    assert [first.train_step()["loss"] for _ in range(2)] == wanted[:2]
    first.save()
    first.checkpoints.wait()
    again = made_trainer(tmp_path / "first", activations=activations)
    assert again.resume() and again.train_step()["loss"] == wanted[2]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@on_amx
def test_selective_keeps_narrow_products(every_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of one block: the MLP's first product alone comes again."""
    model = PersimmonModel(CONFIG)
    model.initialize(torch.Generator().manual_seed(0))
    use_kernels(model)
    keep_activations(model, "selective")
    widths: list[int] = []
    multiply = kernels._multiply

    def watched(a: Tensor, b: Tensor, out: Tensor, **settings: Any) -> Tensor:
        if not a.t().is_contiguous() and not b.is_contiguous():  # x W^T
            widths.append(out.shape[1])
        return multiply(a, b, out, **settings)

    monkeypatch.setattr(kernels, "_multiply", watched)
    model.features(torch.arange(50)[None]).sum().backward()
    assert sorted(widths) == sorted(2 * [192, 64, 200, 64, 200])
