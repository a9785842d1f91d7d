"""Random matrices in the GPU's layouts, and the numbers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_interpreter import DEVICE  # isort: skip - sets the environment that triton reads

from persimmon.fast.cpu.formats import OUTLIERS
from persimmon.fast.cuda import layouts
from persimmon.fast.cuda.kernels import matmul
from persimmon.fast.cuda.layouts import Matrix


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make(name: str, outputs: int, inputs: int, neuron_major: bool = False) -> Matrix:
    """A random matrix in a format, made directly in the GPU's layout (test_layouts.py holds the packed ones to it)."""
    weight = random(outputs, inputs, seed=1)
    if name in ("float32", "bfloat16"):
        return layouts.plain(weight.to(getattr(torch, name)), neuron_major=neuron_major)
    if name == "fp8":
        return layouts.fp8(weight, neuron_major=neuron_major)
    rows, width = (inputs, outputs) if neuron_major else (outputs, inputs)
    generator = torch.Generator().manual_seed(2)
    columns = -(-width // 32) * 32
    scales = (torch.rand(rows, columns // 32, generator=generator) * 0.01 + 1e-3).half()
    if name == "q8":
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        return Matrix(layouts.INT8, outputs, inputs, neuron_major, codes.to(DEVICE), scales.to(DEVICE))
    shape = (rows, columns // 8)
    planes = [torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32) for _ in range(2)]
    if name == "q4":
        return Matrix(layouts.INT4, outputs, inputs, False, planes[0].to(DEVICE), scales.to(DEVICE))
    return with_outliers(planes, scales, outputs, inputs, generator)


def with_outliers(
    planes: list[Tensor], scales: Tensor, outputs: int, inputs: int, generator: torch.Generator
) -> Matrix:
    """Planes whose outlier columns hold zero (high 8, low 0), and those columns apart."""
    columns = torch.full((OUTLIERS,), -1, dtype=torch.int32)
    columns[:3] = torch.tensor([0, inputs // 2, inputs - 1], dtype=torch.int32)
    for column in columns[:3].tolist():
        word, shift = column // 32 * 4 + column % 4, column // 4 % 8 * 4
        high, low = (plane[:, word].long() & ~(15 << shift) for plane in planes)
        planes[0][:, word], planes[1][:, word] = (high | (8 << shift)).to(torch.int32), low.to(torch.int32)
    exact = torch.randn(outputs, OUTLIERS, generator=generator).half()
    high, low, scales, exact, columns = (t.to(DEVICE) for t in (*planes, scales, exact, columns))
    return Matrix(layouts.PLANES, outputs, inputs, False, high, scales, low, exact, columns)


def as_numbers(matrix: Matrix) -> Tensor:
    """[outputs, inputs] in float64."""
    stored = matmul.dequantize(matrix, torch.float32).double()
    return stored.T if matrix.neuron_major else stored
