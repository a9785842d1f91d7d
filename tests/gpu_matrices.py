"""Random matrices in the GPU's layouts, and the numbers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_interpreter import DEVICE  # isort: skip - sets the environment that triton reads

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
    halved = name in ("q4", "planes")
    columns = -(-width // 64) * 64 if halved else -(-width // 32) * 32
    scales = (torch.rand(rows, columns // 32, generator=generator) * 0.01 + 1e-3).half()
    if name == "q8":
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        return Matrix(layouts.INT8, outputs, inputs, neuron_major, codes.to(DEVICE), scales.to(DEVICE))
    planes = [torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8) for _ in range(2)]
    if name == "q4":
        return Matrix(layouts.INT4, outputs, inputs, False, planes[0].to(DEVICE), scales.to(DEVICE))
    return with_outliers(planes, scales, outputs, inputs, generator)


def with_outliers(
    planes: list[Tensor], scales: Tensor, outputs: int, inputs: int, generator: torch.Generator
) -> Matrix:
    """Planes whose outlier columns hold zero (high 8, low 0), and those columns apart."""
    columns = torch.full((layouts.OUTLIERS,), -1, dtype=torch.int32)
    columns[:3] = torch.tensor([0, inputs // 2, inputs - 1], dtype=torch.int32)
    for column in columns[:3].tolist():
        byte, shift = column // 64 * 32 + column % 32, column // 32 % 2 * 4
        planes[0][:, byte] = planes[0][:, byte] & (0xF0 >> shift) | (8 << shift)
        planes[1][:, byte] = planes[1][:, byte] & (0xF0 >> shift)
    exact = torch.randn(outputs, layouts.OUTLIERS, generator=generator).half()
    high, low, scales, exact, columns = (t.to(DEVICE) for t in (*planes, scales, exact, columns))
    return Matrix(layouts.PLANES, outputs, inputs, False, high, scales, low, exact, columns)


def as_numbers(matrix: Matrix) -> Tensor:
    """[outputs, inputs] in float64."""
    stored = matmul.dequantize(matrix, torch.float32).double()
    return stored.T if matrix.neuron_major else stored
