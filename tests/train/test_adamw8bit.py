"""The 8-bit optimizer: its codes, its distance from AdamW, bfloat16 weights, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel
from persimmon.train import adamw8bit
from persimmon.train.adamw8bit import AdamW8bit
from persimmon.train.checkpoint import Checkpoints
from persimmon.train.objective import TokenLoss
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers
from persimmon.train.parallel import World
from tiny_model import tiny_config, tiny_ids

GENERATOR = torch.Generator()


@given(size=st.integers(1, 700), magnitude=st.floats(1e-12, 1e6), seed=st.integers(0, 99))
def test_codes_are_within_a_step(size: int, magnitude: float, seed: int) -> None:
    """A code's neighbours are at most 2 / 127 (or 2 / 255) of the block's largest magnitude apart."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * magnitude
    largest = adamw8bit._blocks(values).abs().amax(1).repeat_interleave(adamw8bit.BLOCK)[:size]
    signed = adamw8bit.decode_signed(*adamw8bit.encode_signed(values, generator))
    assert ((signed - values).abs() <= largest * (2 / 127 + 1e-6)).all()
    unsigned = adamw8bit.decode_unsigned(*adamw8bit.encode_unsigned(values.abs(), generator))
    assert ((unsigned - values.abs()).abs() <= largest * (2 / 255 + 1e-6)).all()
    assert (unsigned[values != 0] > 0).all()


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(300)
    for encode, decode in (
        (adamw8bit.encode_signed, adamw8bit.decode_signed),
        (adamw8bit.encode_unsigned, adamw8bit.decode_unsigned),
    ):
        assert (decode(*encode(zeros, GENERATOR)) == 0).all()


def test_rounding_is_right_on_average() -> None:
    values = torch.linspace(-1, 1, 256)
    generator = torch.Generator().manual_seed(0)
    signed = sum(adamw8bit.decode_signed(*adamw8bit.encode_signed(values, generator)) for _ in range(400)) / 400
    torch.testing.assert_close(signed, values, rtol=0, atol=3e-3)  # steps of up to 0.016, their mean's deviation 4e-4
    third = torch.full((4000,), 1 / 3)
    rounded = adamw8bit.round_stochastically(third, generator)
    assert len(rounded.unique()) == 2
    assert float(rounded.float().mean()) == pytest.approx(1 / 3, abs=6e-5)  # four deviations of the mean
    exact = torch.tensor([1.5, -2.0, 0.0])
    assert torch.equal(adamw8bit.round_stochastically(exact, generator).float(), exact)


def build(state: str, dtype: torch.dtype = torch.float32) -> tuple[PersimmonModel, list[torch.optim.Optimizer]]:
    model = PersimmonModel(tiny_config(hidden_size=64, intermediate_size=256))
    model.initialize(torch.Generator().manual_seed(0), std=0.05)
    model.to(dtype)
    recipe = OptimizerRecipe(matrices="adamw", matrix_lr=2e-3, vector_lr=2e-3, weight_decay=0.05, state=state)
    return model, build_optimizers(model, recipe)


def train(model: PersimmonModel, optimizers: list[torch.optim.Optimizer], steps: range) -> list[float]:
    """A rule to learn: the next id is the last one plus 3."""
    from persimmon.train.loop import Batch

    losses = []
    for step in steps:
        start = tiny_ids(model.config, 8, 1, seed=step) % 100
        row = start + 3 * torch.arange(17)
        batch = Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), [16 * i for i in range(9)])
        loss = TokenLoss().loss(model, batch, 1 / 128, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def weights(model: PersimmonModel) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def test_it_trains_like_adamw() -> None:
    """Over 60 steps the losses stay within 1 % and the weights within 5 % of the way that AdamW went."""
    (exact, adamw), (small, compact) = build("float32"), build("int8")
    start = weights(exact)
    first, second = train(exact, adamw, range(60)), train(small, compact, range(60))
    assert first[-1] < 0.5 * first[0]
    for one, two in zip(first, second, strict=True):
        assert two == pytest.approx(one, rel=0.01)
    distance = (weights(small) - weights(exact)).norm() / (weights(exact) - start).norm()
    assert distance < 0.05


def test_without_codes_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit, "SMALL", 1 << 40)
    (exact, adamw), (small, compact) = build("float32"), build("int8")
    first, second = train(exact, adamw, range(20)), train(small, compact, range(20))
    assert second == pytest.approx(first, rel=1e-5)


def test_bfloat16_weights_train() -> None:
    """Updates below the weights' precision count: plain rounding would lose most of them."""
    (exact, adamw), (rounded, compact) = build("float32"), build("int8", torch.bfloat16)
    first, second = train(exact, adamw, range(60)), train(rounded, compact, range(60))
    assert second[-1] == pytest.approx(first[-1], rel=0.1)
    assert all(p.dtype is torch.bfloat16 for p in rounded.parameters())


def test_the_state_takes_two_bytes_a_number() -> None:
    model, (optimizer,) = build("int8")
    train(model, [optimizer], range(1))
    large = [p for p in model.parameters() if p.numel() >= adamw8bit.SMALL]
    small = [p for p in model.parameters() if p.numel() < adamw8bit.SMALL]
    counted = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    expected = sum(p.numel() for p in large) * adamw8bit.STATE_BYTES + sum(p.numel() for p in small) * 8
    assert counted == pytest.approx(expected, rel=1e-3)


def test_chunks_change_nothing_but_the_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {}
    for chunk in (1 << 22, 512):
        monkeypatch.setattr(adamw8bit, "_CHUNK", chunk)
        model, optimizers = build("int8")
        train(model, optimizers, range(5))
        values[chunk] = weights(model)
    start = weights(build("int8")[0])
    moved = (values[512] - start).norm()
    assert (values[512] - values[1 << 22]).norm() < 0.15 * moved


def test_a_resumed_run_repeats_the_losses(tmp_path: Path) -> None:
    model, optimizers = build("int8")
    train(model, optimizers, range(4))
    checkpoints = Checkpoints(tmp_path, World())
    checkpoints.save(4, model, optimizers, {})
    checkpoints.wait()
    expected = train(model, optimizers, range(4, 8))
    again, fresh = build("int8")
    assert checkpoints.load_newest(again, fresh) is not None
    assert train(again, fresh, range(4, 8)) == expected
    assert isinstance(fresh[0], AdamW8bit)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.state must be float32 or int8"):
        OptimizerRecipe(matrices="adamw", state="int4")
    with pytest.raises(ConfigError, match=r"int8 needs optimizer\.matrices adamw"):
        OptimizerRecipe(state="int8")
