"""Products in every format against torch's, over shapes, types and inputs that are hard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import triton_interpreter
from gpu_matrices import as_numbers, make, random
from persimmon.fast.cuda import layouts
from persimmon.fast.cuda.kernels import matmul
from persimmon.fast.cuda.layouts import Matrix

FORMATS = ["float32", "bfloat16", "fp8", "q8", "q4", "planes"]
QUANTIZED = FORMATS[2:]
"""A library multiplies the others by several tokens."""
DEVICE = triton_interpreter.DEVICE

# Sums of products near 1 in another order. bfloat16 activations: results and, with several tokens, weights are rounded
# to 8 bits, and the interpreter cuts where a GPU rounds.
LIMITS = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 5e-2}}


def check(x: Tensor, matrix: Matrix, bias: Tensor | None, squared: bool) -> None:
    expected = x.double() @ as_numbers(matrix).T
    if bias is not None:
        expected = expected + bias.double()
    if squared:
        expected = expected.relu().square()
    result = matmul.multiply(x, matrix, bias, squared_relu=squared, dtype=torch.float32)
    limits = LIMITS[x.dtype]
    scale = expected.abs().max().clamp_min(1).item()
    torch.testing.assert_close(result.double(), expected, rtol=limits["rtol"], atol=limits["atol"] * scale)


@pytest.mark.parametrize(("name", "tokens"), [(n, 1) for n in FORMATS] + [(n, t) for n in QUANTIZED for t in (2, 20)])
def test_products_equal_torch(name: str, tokens: int) -> None:
    """Odd sizes, one token and several, with and without epilogues."""
    for outputs, inputs in ((24, 64), (37, 80), (1, 300)):
        matrix, x, bias = make(name, outputs, inputs), random(tokens, inputs, seed=3), random(outputs, seed=4)
        check(x, matrix, bias, squared=False)
        check(x, matrix, bias, squared=True)
    check(x, matrix, None, squared=False)


@pytest.mark.parametrize(("name", "tokens"), [(n, 1) for n in FORMATS] + [(n, 5) for n in QUANTIZED])
def test_bfloat16_activations(name: str, tokens: int) -> None:
    check(random(tokens, 80, seed=3).bfloat16(), make(name, 24, 80), random(24, seed=4), squared=False)


@pytest.mark.parametrize("name", QUANTIZED)
def test_partial_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of inputs by themselves, the last one shorter; outliers are in one of them."""
    monkeypatch.setattr(matmul, "tile", lambda on_gpu, interpreted: on_gpu)
    matrix, x = make(name, 70, 300), random(3, 300, seed=3)
    parts = matmul.multiply_in_parts(x, matrix, processors=4)
    assert parts.shape == (2, 3, 70)
    torch.testing.assert_close(parts.sum(0).double(), x.double() @ as_numbers(matrix).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_hard_inputs(name: str) -> None:
    """Zeros, one token that is not zero, large and tiny numbers."""
    matrix, bias = make(name, 24, 96), random(24, seed=4)
    one = torch.zeros(3, 96, device=DEVICE)
    one[1, 95] = 1.0
    for x in (torch.zeros(1, 96, device=DEVICE), one, random(1, 96) * 1e4, random(2, 96) * 1e-20):
        for some in [x] if name in QUANTIZED else x.split(1):
            check(some, matrix, bias, squared=False)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_no_number_stays_visible(tokens: int) -> None:
    x = random(tokens, 64, seed=3)
    x[-1, 5] = float("nan")
    result = matmul.multiply(x, make("q8", 40, 64), random(40, seed=4), squared_relu=True)
    assert result[-1].isnan().all() and not result[:-1].isnan().any()


def test_a_large_matrix_in_gpu_sized_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile sizes that a GPU gets, several programs each way."""
    monkeypatch.setattr(matmul, "tile", lambda on_gpu, interpreted: on_gpu)
    for name in FORMATS:
        check(random(1, 600, seed=3), make(name, 40, 600), random(40, seed=4), squared=False)
    check(random(20, 150, seed=3), make("q4", 200, 150), random(200, seed=4), squared=True)
    tiles = matmul.gemm_tiles(layouts.INT4, 20, 150)
    assert tiles["BLOCK_N"] < 200, "several programs"
    widths = [matmul.gemm_tiles(number, 20, 150)["BLOCK_M"] for number in (layouts.INT4, layouts.INT8, layouts.FP8)]
    assert widths == [32, 64, 64], "as steps of 32 and 64 rows were measured"
