"""Muon and AdamW against their formulas written out, and which parameter gets which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from live_bytes import LiveBytes
from persimmon.errors import ConfigError
from persimmon.train.optimizer import MatrixParameter, Muon, OptimizerRecipe, build_optimizers, orthogonalize
from tiny_model import tiny_model


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: Tensor, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix [len(values), columns] with these singular values, and its left and right directions."""
    left = torch.linalg.qr(random_matrix(len(values), len(values), seed=seed))[0]
    right = torch.linalg.qr(random_matrix(columns, columns, seed=seed + 1))[0][:, : len(values)]
    return left @ torch.diag(values) @ right.T, left, right


# -- the fused projection ----------------------------------------------------------------------------


@given(heads=st.integers(1, 8), dim=st.integers(1, 8), columns=st.integers(1, 12))
def test_split_takes_q_k_v_apart_and_join_puts_them_back(heads: int, dim: int, columns: int) -> None:
    rows = heads * 3 * dim
    update = torch.arange(rows * columns).float().view(rows, columns)
    matrix = MatrixParameter(nn.Parameter(torch.zeros(rows, columns)), (heads, dim))
    parts = matrix.split(update)
    assert parts.shape == (3, heads * dim, columns)
    for part in range(3):
        of_part = [update[(3 * head + part) * dim : (3 * head + part + 1) * dim] for head in range(heads)]
        assert torch.equal(parts[part], torch.cat(of_part))
    assert torch.equal(matrix.join(parts), update)


def test_a_plain_matrix_is_one_part() -> None:
    matrix = MatrixParameter(nn.Parameter(torch.zeros(3, 5)))
    update = random_matrix(3, 5)
    assert torch.equal(matrix.split(update), update[None])
    assert torch.equal(matrix.join(update[None]), update)


# -- orthogonalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0.68, 1.21), (torch.bfloat16, 0.65, 1.24)])
def test_singular_values_come_near_one(dtype: torch.dtype, low: float, high: float) -> None:
    values = torch.logspace(-2, 0, 24)
    matrix, left, right = with_singular_values(values, 40)
    out = orthogonalize(3.0 * matrix[None], dtype=dtype)[0]
    assert out.dtype is torch.float32
    found = torch.linalg.svdvals(out)
    assert low < float(found.min()) and float(found.max()) < high
    # The directions stay: in the basis of the input the result is diagonal.
    inside = left.T @ out @ right
    off_diagonal = inside - torch.diag(inside.diagonal())
    assert float(off_diagonal.abs().max()) < (1e-4 if dtype is torch.float32 else 0.05)


@given(count=st.integers(1, 3), rows=st.integers(1, 6), more=st.integers(0, 6), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_size_and_scale_stays_bounded(count: int, rows: int, more: int, scale: float) -> None:
    out = orthogonalize(scale * random_matrix(count, rows, rows + more, seed=rows))
    assert out.shape == (count, rows, rows + more)
    assert float(torch.linalg.svdvals(out).max()) < 1.21


def test_a_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


# -- Muon --------------------------------------------------------------------------------------------


def written_out_newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic steps on one matrix, in float64, transposed when it is tall."""
    if matrix.shape[0] > matrix.shape[1]:
        return written_out_newton_schulz(matrix.T).T
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def written_out_muon(weight: np.ndarray, gradients: list[np.ndarray], lr: float, momentum: float, decay: float):
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        update = written_out_newton_schulz(momentum * average + (1 - momentum) * gradient)
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = weight * (1 - lr * decay) - lr * scale * update
    return weight


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 5)])
def test_muon_steps_are_the_formula(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(random_matrix(*shape))
    gradients = [random_matrix(*shape, seed=10 + step) for step in range(3)]
    expected = written_out_muon(
        parameter.detach().double().numpy(), [g.double().numpy() for g in gradients], lr=0.1, momentum=0.9, decay=0.5
    )
    muon = Muon([MatrixParameter(parameter)], 0.1, momentum=0.9, weight_decay=0.5)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-5)


def test_fused_queries_keys_and_values_are_stepped_apart() -> None:
    heads, dim, hidden = 3, 4, 12
    fused = nn.Parameter(random_matrix(3 * hidden, hidden))
    fused.grad = random_matrix(3 * hidden, hidden, seed=1)
    split = MatrixParameter(fused, (heads, dim)).split
    apart = [nn.Parameter(part.clone()) for part in split(fused.detach())]
    for parameter, gradient in zip(apart, split(fused.grad), strict=True):
        parameter.grad = gradient.clone()
    Muon([MatrixParameter(fused, (heads, dim))], 0.1).step()
    Muon([MatrixParameter(parameter) for parameter in apart], 0.1).step()
    torch.testing.assert_close(split(fused.detach()), torch.stack([p.detach() for p in apart]))


def test_matrices_without_gradient_rest() -> None:
    moving, resting = (nn.Parameter(random_matrix(4, 4, seed=seed)) for seed in range(2))
    moving.grad = random_matrix(4, 4, seed=5)
    before = resting.detach().clone()
    Muon([MatrixParameter(moving), MatrixParameter(resting)], 0.1, weight_decay=1.0).step()
    assert torch.equal(resting, before)


def wide_and_tall(number: int) -> list[nn.Parameter]:
    shapes = [(48, 96) if seed % 2 else (96, 48) for seed in range(number)]
    parameters = [nn.Parameter(random_matrix(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    for seed, parameter in enumerate(parameters):
        parameter.grad = random_matrix(*parameter.shape, seed=100 + seed)
    return parameters


def test_what_an_update_takes_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tensors of the matrices that are made at once, as memory_plan.py relies on, however many there are."""
    monkeypatch.setattr("persimmon.train.optimizer._TOGETHER", 3 * 48 * 96)
    parameters = wide_and_tall(24)
    muon = Muon([MatrixParameter(parameter) for parameter in parameters], 0.1)
    muon.step()  # makes the moments
    with LiveBytes() as live:
        muon.step()
    at_once = 4 * 3 * 48 * 96
    assert live.peak == pytest.approx(5 * at_once, rel=0.05)


def test_small_batches_of_matrices_give_the_same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (1 << 24, 3 * 48 * 96, 1):
        monkeypatch.setattr("persimmon.train.optimizer._TOGETHER", together)
        parameters = wide_and_tall(8)
        Muon([MatrixParameter(parameter) for parameter in parameters], 0.1, weight_decay=0.2).step()
        found.append([parameter.detach() for parameter in parameters])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-5)


# -- which parameter gets what -----------------------------------------------------------------------


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_every_parameter_once_and_only_block_matrices_decay(matrices: str) -> None:
    model = tiny_model()
    recipe = OptimizerRecipe(matrices=matrices, matrix_lr=0.02, vector_lr=0.008, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen: dict[str, tuple[float, float]] = {}
    for optimizer in build_optimizers(model, recipe):
        for group in optimizer.param_groups:
            assert group["top_lr"] == group["lr"]
            for parameter in group["params"]:
                assert names[parameter] not in seen
                seen[names[parameter]] = (group["lr"], group["weight_decay"])
    assert set(seen) == set(names.values())
    kinds = ("query_key_value.weight", "self_attn.dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
    for name, settings in seen.items():
        assert settings == ((0.02, 0.1) if name.endswith(kinds) else (0.008, 0.0)), name


def test_only_the_fused_projection_is_taken_apart() -> None:
    model = tiny_model()
    (muon, _) = build_optimizers(model, OptimizerRecipe())
    assert isinstance(muon, Muon)
    for matrix in muon._matrices:
        fused = matrix.parameter.shape == (3 * model.config.hidden_size, model.config.hidden_size)
        assert matrix.fused_heads == ((model.config.num_heads, model.config.head_dim) if fused else None)


def test_the_first_adamw_step_is_the_formula() -> None:
    model = tiny_model()
    recipe = OptimizerRecipe(matrices="adamw", matrix_lr=0.02, vector_lr=0.008, weight_decay=0.1)
    optimizers = build_optimizers(model, recipe)
    expected = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = random_matrix(*parameter.shape, seed=seed)
        matrix = name.startswith("layers.") and parameter.dim() == 2
        lr, decay = (0.02, 0.1) if matrix else (0.008, 0.0)
        # After bias correction the first step is lr * g / (|g| + eps).
        step = parameter.grad / (parameter.grad.abs() + 1e-8)
        expected[name] = parameter.detach() * (1 - lr * decay) - lr * step
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrices": "sgd"}, "muon or adamw, got 'sgd'"),
        ({"matrix_lr": 0.0}, "matrix_lr must be positive, got 0.0"),
        ({"vector_lr": -1.0}, "vector_lr must be positive"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerRecipe(**settings)
