"""Random weights of any shape, made on the device in the kernels' layouts. They have a chosen share of active neurons.

Weights are uniform with the release's deviation of 0.02. After a LayerNorm with gain 1 the pre-activations have the
deviation 0.02 * sqrt(hidden), so a bias of that many deviations below zero leaves the wanted share positive. Which
neurons are active together is chance; a trained model's tokens share more of them, so batches skip more there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch

from persimmon.config import ModelConfig
from persimmon.fast.cpu.formats import OUTLIERS
from persimmon.fast.cuda.layouts import FP8, INT4, INT8, PLAIN, PLANES, Matrix
from persimmon.fast.cuda.weights import Layer, Norm, Weights
from persimmon.model import rotary_tables

STD = 0.02  # adept-inference megatron/model/utils.py

FORMATS = ("bfloat16", "q8", "q4", "p44", "fp8", "float32")

_UNIFORM = math.sqrt(12.0)  # a range of 1 has a deviation of 1 / sqrt(12)


def synthesize(config: ModelConfig, name: str, device: torch.device, active: float = 0.1, seed: int = 0) -> Weights:
    """Weights in a format; everything follows from the seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    hidden, neurons = config.hidden_size, config.intermediate_size
    kind = {"float32": PLAIN, "bfloat16": PLAIN, "fp8": FP8, "q8": INT8, "q4": INT4, "p44": INT4}[name]
    head_kind = INT8 if name in ("q8", "q4", "p44") else kind

    def zeros(size: int) -> torch.Tensor:
        return torch.zeros(size, device=device)

    def norm(size: int) -> Norm:
        return Norm(torch.ones(size, device=device), zeros(size))

    def matrix(kind: int, outputs: int, inputs: int, neuron_major: bool = False) -> Matrix:
        return random_matrix(kind, outputs, inputs, neuron_major, dtype, generator)

    def mlp() -> tuple[Matrix, Matrix]:
        if name == "p44":
            return matrix(PLANES, neurons, hidden), matrix(INT8, hidden, neurons, True)
        return matrix(kind, neurons, hidden), matrix(kind, hidden, neurons, name != "q4")

    bias = NormalDist().inv_cdf(active) * STD * math.sqrt(hidden)
    layers = []
    for _ in range(config.num_layers):
        head_norm = norm(config.head_dim)
        qk = (head_norm.weight, head_norm.bias) * 2 if config.qk_layernorm else None
        up, down = mlp()
        layers.append(Layer(
            norm(hidden), norm(hidden), qk, matrix(kind, 3 * hidden, hidden), zeros(3 * hidden),
            matrix(kind, hidden, hidden), zeros(hidden), up, zeros(neurons) + bias, down, zeros(hidden),
        ))  # fmt: skip
    embedding = random_matrix(PLAIN, config.vocab_size, hidden, False, dtype, generator).codes
    cos, sin = rotary_tables(config, torch.arange(config.max_positions))
    rotary = (cos.contiguous().to(device), sin.contiguous().to(device))
    head = matrix(head_kind, config.vocab_size, hidden)
    return Weights(config, name, dtype, embedding, layers, norm(hidden), head, rotary)


def random_matrix(
    kind: int, outputs: int, inputs: int, neuron_major: bool, dtype: torch.dtype, generator: torch.Generator
) -> Matrix:
    """A matrix of deviation 0.02."""
    device = generator.device
    rows, width = (inputs, outputs) if neuron_major else (outputs, inputs)

    def codes(count: int, low: int, high: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, (rows, count), generator=generator, device=device, dtype=kind)

    if kind in (PLAIN, FP8):
        values = torch.empty(rows, width, dtype=dtype, device=device).uniform_(-0.5, 0.5, generator=generator)
        if kind == PLAIN:
            return Matrix(PLAIN, outputs, inputs, neuron_major, values.mul_(_UNIFORM * STD))
        scales = torch.full((rows,), _UNIFORM * STD, device=device)
        return Matrix(FP8, outputs, inputs, neuron_major, values.to(torch.float8_e4m3fn), scales)
    columns = -(-width // 32) * 32
    steps = 16 if kind == INT4 else 256
    scales = torch.full((rows, columns // 32), _UNIFORM * STD / steps, dtype=torch.float16, device=device)
    if kind == INT8:
        return Matrix(INT8, outputs, inputs, neuron_major, codes(columns, -128, 128, torch.int8), scales)
    high = codes(columns // 8, -(2**31), 2**31, torch.int32)
    if kind == INT4:
        return Matrix(INT4, outputs, inputs, False, high, scales)
    low = codes(columns // 8, -(2**31), 2**31, torch.int32)
    exact = torch.zeros(rows, OUTLIERS, dtype=torch.float16, device=device)
    none = torch.full((OUTLIERS,), -1, dtype=torch.int32, device=device)
    return Matrix(PLANES, outputs, inputs, False, high, scales, low, exact, none)


def all_matrices(weights: Weights) -> list[Matrix]:
    """Those that a decoding step reads."""
    per_layer: Callable[[Layer], list[Matrix]] = lambda la: [la.query_key_value, la.dense, la.up, la.down]  # noqa: E731
    return [weights.head, *(matrix for layer in weights.layers for matrix in per_layer(layer))]
