"""Rotary positions in both precisions: the tables against formulas and bits worked out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persimmon.config import PRESETS, ModelConfig
from persimmon.model import apply_rotary, rotary_angles, rotary_tables
from tiny_model import tiny_config, tiny_ids, tiny_model

SHAPES = [
    PRESETS["8b"],
    PRESETS["mini"],
    tiny_config(num_heads=8, partial_rotary_factor=1.0),
    tiny_config(hidden_size=40, num_heads=5, partial_rotary_factor=0.25, rotary_base=123.0, max_positions=64),
]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, by its bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("config", [PRESETS["8b"], tiny_config(max_positions=16384)], ids=["8b", "tiny"])
def test_bfloat16_angles_round_frequency_position_and_product(config: ModelConfig) -> None:
    config = config.replace(rotary_precision="bfloat16")
    exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    frequencies = to_bfloat16(1.0 / config.rotary_base**exponents)
    positions = to_bfloat16(np.arange(16384))
    expected = to_bfloat16(positions[:, None] * frequencies)  # a product of two 8-bit mantissas is exact in float32
    angles = rotary_angles(config, torch.arange(16384))
    assert angles.dtype is torch.bfloat16
    np.testing.assert_array_equal(angles.float().numpy(), expected)
    cos, sin = rotary_tables(config, torch.arange(16384))
    assert cos.dtype is sin.dtype is torch.float32
    # cos itself may differ in its last float32 digit between libraries, and so round to the neighbour.
    for found, exact in ((cos, np.cos(expected.astype(np.float64))), (sin, np.sin(expected.astype(np.float64)))):
        np.testing.assert_array_equal(found.numpy(), to_bfloat16(found.numpy()))
        np.testing.assert_allclose(found.numpy(), to_bfloat16(exact), rtol=2**-7, atol=1e-7)


def test_bfloat16_knows_1025_positions() -> None:
    config = PRESETS["8b"].replace(rotary_precision="bfloat16")
    first = rotary_angles(config, torch.arange(16384))[:, 0].float()  # its frequency is 1: the positions themselves
    assert len(first.unique()) == 1025
    assert torch.equal(first[:257], torch.arange(257.0))
    assert float((first - torch.arange(16384.0)).abs().max()) == 32.0


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.num_heads}x{c.head_dim}")
def test_float32_tables_are_the_formula(config: ModelConfig) -> None:
    positions = torch.tensor([[0, 1, 2, 63], [5, 17, 40, 63]])
    exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    angles = positions.numpy()[..., None] * (1.0 / config.rotary_base**exponents)
    cos, sin = rotary_tables(config, positions)
    np.testing.assert_allclose(cos.numpy(), np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles), atol=1e-5)


def test_precisions_differ_long_before_position_256() -> None:
    """An angle near 53 rad has a bfloat16 spacing of 0.25 rad: the modes are two models, not two roundings."""
    config = PRESETS["8b"]
    exact, _ = rotary_tables(config, torch.arange(16384))
    rounded, _ = rotary_tables(config.replace(rotary_precision="bfloat16"), torch.arange(16384))
    difference = (exact - rounded).abs().amax(1)
    assert float(difference[:256].max()) > 0.1
    assert float(difference[8192:].max()) > 1.0


def test_apply_rotary_turns_the_first_dims_and_passes_the_rest() -> None:
    config = tiny_config(hidden_size=32)
    x = torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = (t[None, :, None] for t in rotary_tables(config, torch.arange(5)))
    out = apply_rotary(x, cos, sin)
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.equal(out[:, 0], x[:, 0])  # position 0 does not turn
    pairs = [torch.hypot(t[..., :4], t[..., 4:8]) for t in (out, x)]
    torch.testing.assert_close(*pairs)


def test_float32_attention_sees_differences_of_positions_only() -> None:
    model = tiny_model(max_positions=16384).to(torch.float64)
    ids = tiny_ids(model.config, 1, 40)
    near, far = (model(ids, positions=torch.arange(40) + start) for start in (0, 16000))
    # Angles near 16,000 rad are rounded to steps of 0.001 rad in float32.
    assert 0 < float((near - far).detach().abs().max()) < 0.02
