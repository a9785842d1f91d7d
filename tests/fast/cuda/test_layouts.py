"""Packed weights rearranged for the GPU: the same numbers to the last bit, in every format, padded or not."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("persimmon.fast.cpu._native", reason="the packer is part of the CPU engine")

import packed_layouts as packed
import triton_interpreter  # skips without triton
from persimmon.fast.cuda import layouts, weights
from persimmon.fast.cuda.kernels.matmul import dequantize

SHAPES = [(5, 16), (3, 256), (40, 80), (7, 320), (2, 600)]


def unpacked(matrix: layouts.Matrix) -> torch.Tensor:
    """Its numbers, by the kernel, where kernels run."""
    parts = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
    there = {name: part.to(triton_interpreter.DEVICE) for name, part in parts.items() if isinstance(part, torch.Tensor)}
    return dequantize(replace(matrix, **there), torch.float32).cpu()


def numbers(matrix: layouts.Matrix) -> np.ndarray:
    return unpacked(matrix).numpy()


def random_weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_rows(kind: str, shape: tuple[int, int]) -> None:
    rows = packed.pack(kind, random_weights(shape))
    expected = (packed.unpack_q8 if kind == "q8" else packed.unpack_q4)(rows)[:, : shape[1]]
    make = layouts.from_q8 if kind == "q8" else layouts.from_q4
    matrix = make(torch.from_numpy(rows), shape[1])
    np.testing.assert_array_equal(numbers(matrix), expected)
    assert matrix.columns >= shape[1] and matrix.columns % 32 == 0
    bits = 8.5 if kind == "q8" else 4.5
    assert matrix.num_bytes * 8 == matrix.columns * shape[0] * bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_planes_become_int8(shape: tuple[int, int]) -> None:
    top, rest = packed.pack_planes(random_weights(shape))
    matrix = layouts.from_head_planes(torch.from_numpy(top), torch.from_numpy(rest), shape[1])
    assert matrix.format == layouts.INT8
    np.testing.assert_array_equal(numbers(matrix), packed.unpack_planes(top, rest)[:, : shape[1]])


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e-3, 1e3, 4.5e5])
def test_scales_of_planes_are_float16_numbers(magnitude: float) -> None:
    """From the smallest unit to the largest weights, in rows whose groups differ by orders of magnitude."""
    w = random_weights((6, 600)) * np.float32(magnitude)
    w = np.clip(w, -magnitude, magnitude) * np.repeat(np.float32(10) ** -np.arange(20), 32)[:600]
    top, rest = packed.pack_planes(np.ascontiguousarray(w, np.float32))
    matrix = layouts.from_head_planes(torch.from_numpy(top), torch.from_numpy(rest), 600)
    assert matrix.scales is not None and torch.isfinite(matrix.scales).all()
    expected = packed.read_planes(top, rest)
    np.testing.assert_array_equal(matrix.scales.float(), expected.scales[:, : matrix.columns : 32])
    np.testing.assert_array_equal(numbers(matrix), expected.floats[:, :600])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neurons_stay_rows(shape: tuple[int, int]) -> None:
    rows = packed.pack_neurons(random_weights(shape))
    matrix = layouts.from_neurons(torch.from_numpy(rows), shape[1])
    assert matrix.neuron_major and (matrix.inputs, matrix.outputs) == shape
    np.testing.assert_array_equal(numbers(matrix), packed.unpack_neurons(rows)[:, : shape[1]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_records_become_rows(shape: tuple[int, int]) -> None:
    outputs, neurons = shape
    records = packed.pack_records(random_weights(shape))
    matrix = layouts.from_records(torch.from_numpy(records), outputs, neurons)
    assert not matrix.neuron_major and (matrix.outputs, matrix.inputs) == shape
    np.testing.assert_array_equal(numbers(matrix), packed.unpack_records(records)[:neurons, :outputs].T)


@pytest.mark.parametrize("hidden", [48, 256, 320])
def test_p44_records_come_apart(hidden: int) -> None:
    neurons, columns = 9, np.array([0, 3, 17, *[-1] * 13], np.int32)
    up, down = random_weights((neurons, hidden)), random_weights((neurons, hidden), 1)
    exact = np.zeros((neurons, 16), np.float16)
    exact[:, :3] = up[:, columns[:3]]
    up[:, columns[:3]] = 0
    top, rest = packed.pack_planes(up)
    rows = packed.pack_neurons(down)
    hot, cold = packed.with_outliers(top, hidden, exact), np.hstack([rest, rows])
    first, second = layouts.from_p44(*map(torch.from_numpy, (hot, cold, columns)), hidden)
    expected = packed.unpack_planes(top, rest)[:, :hidden].copy()
    expected[:, columns[:3]] = exact[:, :3]
    np.testing.assert_array_equal(numbers(first), expected)
    np.testing.assert_array_equal(numbers(second), packed.unpack_neurons(rows)[:, :hidden])


@pytest.mark.parametrize("neuron_major", [False, True])
def test_plain_and_fp8(neuron_major: bool) -> None:
    weight = torch.from_numpy(random_weights((24, 40)))
    weight[3] = 0
    weight[:, 5] *= 1000
    plain = layouts.plain(weight, neuron_major=neuron_major)
    assert torch.equal(unpacked(plain), weight.T if neuron_major else weight)
    rounded = layouts.fp8(weight, neuron_major=neuron_major)
    assert rounded.num_bytes == 24 * 40 + 4 * rounded.stored_shape[0]
    stored = weight.T if neuron_major else weight
    error = (unpacked(rounded) - stored).abs()
    scale = stored.abs().amax(1, keepdim=True) / 448
    # Three bits behind the leading one; below the smallest normal number the step is 2^-9.
    assert (error <= torch.maximum(stored.abs() / 16, scale / 1024) * 1.001).all()


@pytest.mark.parametrize("neuron_major", [False, True])
def test_slices_change_nothing(neuron_major: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix is rounded to fp8 and moved to the device in pieces of rows, the last one smaller."""
    weight = torch.from_numpy(random_weights((25, 40)))
    whole = layouts.fp8(weight, neuron_major=neuron_major)
    monkeypatch.setattr(layouts, "SLICE_NUMBERS", 3 * 40)
    monkeypatch.setattr(weights, "SLICE_NUMBERS", 3 * 40)
    sliced = layouts.fp8(weight, neuron_major=neuron_major)
    assert torch.equal(sliced.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(sliced.scales, whole.scales)
    assert len(list(layouts.row_slices(25, 40))) == 9
    for kind in (torch.float32, torch.bfloat16):
        moved = weights._moved(weight.numpy(), "F32", kind, torch.device("cpu"))
        assert moved.dtype is kind and torch.equal(moved, weight.to(kind))


def test_rounding_to_fp8_holds_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor on the way is as large as the matrix, but its codes."""
    monkeypatch.setattr(layouts, "SLICE_NUMBERS", 256)
    weight = torch.from_numpy(random_weights((64, 64))).bfloat16()
    with Largest() as seen:
        layouts.fp8(weight)
    assert seen.sizes[torch.float8_e4m3fn] == 64 * 64
    assert max(size for kind, size in seen.sizes.items() if kind is not torch.float8_e4m3fn) <= 256


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.sizes[result.dtype] = max(self.sizes.get(result.dtype, 0), result.numel())
        return result
