"""QK LayerNorm, rotary, cache and attention against the model's own functions, over cache types, tables and splits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_interpreter
from persimmon.config import ModelConfig, preset
from persimmon.fast.cuda.kernels import attention
from persimmon.fast.cuda.kernels.cache_write import cache_write
from persimmon.fast.cuda.pool import Pool
from persimmon.model import apply_rotary, rotary_tables

DEVICE = torch.device(triton_interpreter.DEVICE)

# What a stored number may differ by, as a share of the largest of its head: half a step of the format, and a whole one
# where the interpreter cuts (bfloat16) or sometimes rounds the wrong way (fp8). float32: LayerNorm in another order.
STEPS = {"float32": 1e-6, "bfloat16": 2**-7, "int8": 0.5 / 127, "fp8": 64 / 448}


def shape(**changes: object) -> ModelConfig:
    return preset("test", hidden_size=48, num_heads=3, **changes)  # heads of 16


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tables(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def expected_heads(config: ModelConfig, fused: Tensor, norms: tuple[Tensor, ...] | None, positions: Tensor) -> Tensor:
    """[3, T, N, D]: queries, keys, values as the model makes them."""
    q, k, v = fused.view(-1, config.num_heads, 3, config.head_dim).unbind(2)
    if norms is not None:
        q = F.layer_norm(q, q.shape[-1:], norms[0], norms[1], config.layer_norm_eps)
        k = F.layer_norm(k, k.shape[-1:], norms[2], norms[3], config.layer_norm_eps)
    cos, sin = (t[None, :, None].to(DEVICE) for t in rotary_tables(config, positions.long().cpu()))
    return torch.stack([apply_rotary(q[None], cos, sin)[0], apply_rotary(k[None], cos, sin)[0], v])


def stored(pool: Pool, slots: list[int]) -> Tensor:
    """[2, T, N, D]: what the cache holds, as numbers."""
    layer = pool.layers[0]
    parts = []
    for which, values in enumerate((layer.keys, layer.values)):
        numbers = values[slots].float()
        parts.append(numbers * layer.scales[which][slots][..., None] if layer.scales is not None else numbers)
    return torch.stack(parts)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", list(STEPS))
@pytest.mark.parametrize("paged", [False, True])
def test_cache_write(kv_dtype: str, paged: bool, precision: str) -> None:
    """Tokens of two sequences at far apart positions, in static and paged tables, and both rotary precisions."""
    config = shape(rotary_precision=precision)
    pool = Pool(config, 5, 8, kv_dtype, DEVICE)
    fused = random(4, 3 * 48)
    fused[1] *= 1e4
    fused[3, :16] = 0.0
    norms = tuple(random(16, seed=s) for s in range(1, 5))
    cos, sin = (t.to(DEVICE) for t in rotary_tables(config, torch.arange(config.max_positions)))
    positions, rows = ints(0, 9, 15, 3), ints(0, 0, 0, 1)
    table = tables([4, 0], [2, 3]) if paged else tables([0, 1], [2, 3])
    slots = [32, 1, 7, 19] if paged else [0, 9, 15, 19]
    out = torch.empty(4, 3, 16, device=DEVICE)
    layer = pool.layers[0]
    cache_write(
        fused, norms, (cos, sin), positions, rows, table, layer.keys, layer.values, layer.scales, 1e-5, 8, paged, out
    )
    expected = expected_heads(config, fused, norms, positions)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    largest = expected[1:].abs().amax(-1, keepdim=True)
    error = (stored(pool, slots) - expected[1:]).abs()
    assert (error <= STEPS[kv_dtype] * 1.01 * largest + 1e-5).all()
    untouched = [slot for slot in range(48) if slot not in slots]
    assert not stored(pool, untouched).any()


def test_positions_deep_in_the_context_and_models_without_norm() -> None:
    config = shape(qk_layernorm=False)
    pool = Pool(config, 1, 16_384, "float32", DEVICE)
    fused, positions = random(2, 3 * 48), ints(16_383, 8_200)
    cos, sin = (t.to(DEVICE) for t in rotary_tables(config, torch.arange(config.max_positions)))
    out, layer = torch.empty(2, 3, 16, device=DEVICE), pool.layers[0]
    cache_write(
        fused, None, (cos, sin), positions, ints(0, 0), tables([0]), layer.keys, layer.values, None, 1e-5, 16_384,
        True, out,
    )  # fmt: skip
    expected = expected_heads(config, fused, None, positions)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(stored(pool, [16_383, 8_200]), expected[1:])


def filled_pool(config: ModelConfig, kv_dtype: str, blocks: int, seed: int = 7) -> Pool:
    """A pool whose every slot holds something."""
    pool = Pool(config, blocks, 8, kv_dtype, DEVICE)
    layer = pool.layers[0]
    for number, part in enumerate((layer.keys, layer.values)):
        values = random(*part.shape, seed=seed + number)
        if kv_dtype == "int8":
            values = (values * 40).round().clamp(-127, 127)
        part.copy_(values.to(part.dtype))
    for number, scales in enumerate(layer.scales or ()):
        scales.copy_(random(*scales.shape, seed=seed + 9 + number).abs() * 0.1)
    return pool


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kv_dtype", list(STEPS))
@pytest.mark.parametrize("paged", [False, True])
def test_decode_attention(kv_dtype: str, paged: bool, splits: int) -> None:
    """Rows of 1, 20 and 8 keys in one call: splits without keys, blocks filled and not, large and equal scores."""
    config = shape()
    pool = filled_pool(config, kv_dtype, 9)
    table = tables([5, 0, 0], [4, 1, 8], [3, 0, 0]) if paged else tables([0, 1, 2], [3, 4, 5], [6, 7, 8])
    slots = [[40], [*range(32, 40), *range(8, 16), *range(64, 68)], list(range(24, 32))]
    if not paged:
        slots = [[0], list(range(24, 44)), list(range(48, 56))]
    q = random(3, 3, 16, seed=3)
    q[1, 0] *= 100.0  # one key takes all
    q[2, 1] = 0.0  # all keys alike
    layer = pool.layers[0]
    out = attention.decode_attention(
        q, layer.keys, layer.values, layer.scales, ints(0, 19, 7), ints(0, 1, 2), table, 8, paged, splits,
        arrivals := torch.zeros(9, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    assert not arrivals.any(), "ready for the next call"
    for row, places in enumerate(slots):
        keys, values = stored(pool, places)
        scores = torch.einsum("nd,snd->ns", q[row].double(), keys.double()) / math.sqrt(16)
        expected = torch.einsum("ns,snd->nd", scores.softmax(-1), values.double())
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", list(STEPS))
def test_gather(kv_dtype: str) -> None:
    pool = filled_pool(shape(), kv_dtype, 6)
    layer = pool.layers[0]
    expected = stored(pool, [*range(40, 48), *range(8, 13)])
    for which, part in enumerate((layer.keys, layer.values)):
        scales = layer.scales[which] if layer.scales is not None else None
        found = attention.gather(part, scales, ints(5, 1), 13, range(1, 3), 8, torch.float32)
        torch.testing.assert_close(found, expected[which][:, 1:3], rtol=1e-6, atol=0)


def test_gpu_sized_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile sizes that a GPU gets: several steps along the keys, several programs over the heads."""
    monkeypatch.setattr(attention, "tile", lambda on_gpu, interpreted: on_gpu)
    config = shape()
    pool = filled_pool(config, "int8", 40)
    layer, q = pool.layers[0], random(1, 3, 16)
    table = ints(*range(40))[None]
    out = attention.decode_attention(q, layer.keys, layer.values, layer.scales, ints(299), ints(0), table, 8, True, 2,
                                     torch.zeros(9, dtype=torch.int32, device=DEVICE))  # fmt: skip
    keys, values = stored(pool, list(range(300)))
    scores = torch.einsum("nd,snd->ns", q[0], keys) / 4
    torch.testing.assert_close(out[0], torch.einsum("ns,snd->nd", scores.softmax(-1), values), rtol=1e-4, atol=1e-4)
    found = attention.gather(layer.keys, layer.scales[0], table[0], 300, range(3), 8, torch.float32)
    torch.testing.assert_close(found, keys)


def test_number_of_splits() -> None:
    assert attention.num_splits(1, 64, 132) == 16
    assert attention.num_splits(64, 64, 132) == 1
    assert attention.num_splits(1, 2, 1_000) == 16
