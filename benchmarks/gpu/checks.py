"""Every kernel against plain torch on this device, at the shape that will be measured. Each check: error and its limit.

The full suite over hard inputs is `PERSIMMON_TEST_ON_GPU=1 pytest tests/fast/cuda`; this is what must hold before any
time is worth anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon.config import ModelConfig
from persimmon.fast.cuda import synthesize
from persimmon.fast.cuda.kernels import attention, matmul, norm, sampling, sparse_mlp
from persimmon.fast.cuda.kernels.cache_write import cache_write
from persimmon.fast.cuda.layouts import FP8, INT4, INT8, PLAIN, PLANES, Matrix
from persimmon.fast.cuda.network import ARRIVALS
from persimmon.fast.cuda.pool import Pool
from persimmon.model import apply_rotary, rotary_tables

KINDS = {"plain": PLAIN, "fp8": FP8, "int8": INT8, "int4": INT4, "planes": PLANES}

# Relative to the largest expected value. Products in bfloat16: activations and results have 8 bits; sums are float32.
PRODUCT_LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

Check = tuple[str, float, float]
"""Name, error, limit."""


def supports_fp8(device: torch.device) -> bool:
    """Compute capability 8.9 and later; the interpreter too."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def groups(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Iterator[Check]]]]:
    """The checks in groups: one that crashes leaves the others."""
    plain = "bfloat16" if dtype is torch.bfloat16 else "float32"
    fp8 = supports_fp8(device)
    for name in KINDS:
        if name != "fp8" or fp8:
            yield f"products, {name}", partial(products, name, config, device, dtype)
    yield "progressive up projection", partial(progressive, config, device, dtype)
    for name in (plain, "int8", *(["fp8"] if fp8 else [])):
        yield f"attention, {name} cache", partial(caches, name, config, device, dtype)
    yield "norms, activation, sampling", partial(rest, config, device)


def held(checks: Iterator[Check]) -> dict[str, object]:
    """All checks of a group: {name: {"error", "limit", "holds"}}, and whether all hold."""
    found = {name: {"error": error, "limit": limit, "holds": error <= limit} for name, error, limit in checks}
    return {"checks": found, "holds": all(check["holds"] for check in found.values())}


def distance(result: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((result.double() - expected.double()).abs().max() / scale).item())


def numbers(matrix: Matrix) -> Tensor:
    """[outputs, inputs] in float32."""
    stored = matmul.dequantize(matrix, torch.float32).float()
    return stored.T if matrix.neuron_major else stored


def products(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """gemv, gemm, and the down projection with and without its zeros in a format."""
    hidden, neurons, limit, kind = config.hidden_size, config.intermediate_size, PRODUCT_LIMIT[dtype], KINDS[name]
    generator = torch.Generator(device=device).manual_seed(1)
    bias = torch.randn(neurons, generator=generator, device=device) - 1.0
    up = synthesize.random_matrix(kind, neurons, hidden, False, dtype, generator)
    for tokens in (1, 8, 64) if kind != PLAIN else (1,):  # a library has the others
        x = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
        expected = (x.float() @ numbers(up).T + bias).relu().square()
        yield f"{name} x {tokens}", distance(matmul.multiply(x, up, bias, squared_relu=True), expected), limit
    if kind in (PLAIN, FP8, INT8):
        down = synthesize.random_matrix(kind, hidden, neurons, True, dtype, generator)
        yield from sparse(name, down, generator, dtype)


def progressive(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """The p44 up projection with an infinite margin."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    generator = torch.Generator(device=device).manual_seed(4)
    bias = torch.randn(neurons, generator=generator, device=device) - 1.0
    planes = synthesize.random_matrix(PLANES, neurons, hidden, False, dtype, generator)
    x = torch.randn(1, hidden, generator=generator, device=device).to(dtype)
    hidden_values, _ = sparse_mlp.progressive_up(x, planes, sparse_mlp.outlier_mask(planes), bias, math.inf)
    expected = (x.float() @ numbers(planes).T + bias).relu().square()
    yield "progressive, exact", distance(hidden_values, expected), PRODUCT_LIMIT[dtype]


def sparse(name: str, down: Matrix, generator: torch.Generator, dtype: torch.dtype) -> Iterator[Check]:
    """The down projection of every neuron and of the active ones; a tenth of them is."""
    for tokens in (1, 4, 32):
        hidden = torch.randn(tokens, down.inputs, generator=generator, device=generator.device)
        hidden = ((hidden - 1.28).relu().square()).to(dtype)
        expected = hidden.float() @ numbers(down).T
        for skip in (False, True) if tokens <= sparse_mlp.MOST_ACTIVE_TOKENS else (False,):
            arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=hidden.device)
            result = sparse_mlp.down(hidden, down, 4 if tokens == 32 else 32, arrivals, skip=skip)
            kind = "active" if skip else "all"
            yield f"{name} {kind} rows x {tokens}", distance(result, expected), PRODUCT_LIMIT[dtype]


def caches(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Cache write, decode attention and gather with a type of cache, over a paged sequence of 200 tokens."""
    heads, dim, length = config.num_heads, config.head_dim, 200
    generator = torch.Generator(device=device).manual_seed(2)
    fused = torch.randn(length, 3 * config.hidden_size, generator=generator, device=device).to(dtype)
    ones, zeros = torch.ones(dim, device=device), torch.zeros(dim, device=device)
    positions = torch.arange(length, dtype=torch.int32, device=device)
    cos, sin = (t.to(device) for t in rotary_tables(config, torch.arange(length)))
    q, k, v = fused.float().view(length, heads, 3, dim).unbind(2)
    turn = (cos[None, :, None], sin[None, :, None])
    q, k = (apply_rotary(F.layer_norm(t, (dim,), eps=config.layer_norm_eps)[None], *turn)[0] for t in (q, k))
    scores = torch.einsum("nd,snd->ns", q[-1], k) / math.sqrt(dim)
    expected = torch.einsum("ns,snd->nd", scores.softmax(-1), v)
    table = torch.tensor([[6, 1, 5, 0, 2, 3, 4]], dtype=torch.int32, device=device)
    pool = Pool(config.replace(num_layers=1), 7, 32, name, device)
    layer, out = pool.layers[0], torch.empty(length, heads, dim, dtype=dtype, device=device)
    rows = torch.zeros_like(positions)
    norms = (ones, zeros, ones, zeros)
    cache_write(fused, norms, (cos, sin), positions, rows, table, layer.keys, layer.values, layer.scales,
                config.layer_norm_eps, 32, True, out)  # fmt: skip
    limit = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2, "fp8": 0.1}[name]
    yield f"queries, {name} cache", distance(out, q), 2e-2 if dtype is torch.bfloat16 else 1e-4
    scales = layer.scales[0] if layer.scales else None
    keys = attention.gather(layer.keys, scales, table[0], length, range(heads), 32, torch.float32)
    yield f"gather, {name} cache", distance(keys, k), limit * (1.5 if name == "fp8" else 1)
    for splits in (1, 8):
        last = (positions[-1:].contiguous(), rows[-1:].contiguous())
        result = attention.decode_attention(
            out[-1:].contiguous(),
            layer.keys,
            layer.values,
            layer.scales,
            *last,
            table,
            32,
            True,
            splits,
            torch.zeros(heads, dtype=torch.int32, device=device),
        )
        yield f"attention in {splits}, {name} cache", distance(result[0], expected), limit


def rest(config: ModelConfig, device: torch.device) -> Iterator[Check]:
    """Norms, activation and greedy sampling."""
    hidden, generator = config.hidden_size, torch.Generator(device=device).manual_seed(3)
    x, added = torch.randn(2, 5, hidden, generator=generator, device=device)
    gain, shift = torch.randn(2, hidden, generator=generator, device=device)
    expected = F.layer_norm(x + added + shift, (hidden,), gain, shift, config.layer_norm_eps)
    result = norm.residual_layer_norm(x.clone(), added[None], shift, gain, shift, config.layer_norm_eps, torch.float32)
    yield "residual and LayerNorm", distance(result, expected), 1e-4
    yield "squared ReLU", distance(norm.bias_squared_relu(x, shift, x.dtype), (x + shift).relu().square()), 1e-5
    logits = torch.randn(4, config.vocab_size, generator=generator, device=device)
    ids, positions = (torch.zeros(4, dtype=torch.int32, device=device) for _ in range(2))
    outputs = torch.zeros(4, 4, dtype=torch.int32, device=device)
    sampling.sample(logits, sampling.SamplingState.room_for(4, device), ids, positions, outputs, filters=False)
    yield "greedy", float((ids.long() != logits.argmax(1)).sum().item()), 0.0
