"""The next token on the device: greedy ties, filters against infer/sampling.py, distribution, counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import triton_interpreter
from persimmon.fast.cuda.kernels import sampling
from persimmon.fast.cuda.kernels.sampling import SamplingState
from persimmon.infer.params import SamplingParams
from persimmon.infer.sampling import choose_filters

DEVICE = torch.device(triton_interpreter.DEVICE)


def state_of(rows: int, **columns: object) -> SamplingState:
    state = SamplingState.room_for(rows, DEVICE)
    for name, value in columns.items():
        target = getattr(state, name)
        target.copy_(torch.as_tensor(value, dtype=target.dtype).expand(rows))
    return state


def draw(logits: Tensor, state: SamplingState, *, filters: bool) -> list[int]:
    rows = logits.shape[0]
    ids, positions = (torch.zeros(rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
    outputs = torch.full((rows, 8), -1, dtype=torch.int32, device=DEVICE)
    before = state.count.clone()
    sampling.sample(logits, state, ids, positions, outputs, filters=filters)
    assert positions.tolist() == [1] * rows and state.count.tolist() == (before + 1).tolist()
    places = (before % 8).long()
    assert outputs[torch.arange(rows, device=DEVICE), places].tolist() == ids.tolist()
    return ids.tolist()


def test_greedy_takes_the_first_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks of the vocabulary, with ties inside and across them, infinities and nan-free extremes."""
    monkeypatch.setattr(sampling, "tile", lambda *_: 64)
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, [70, 71, 250]] = 9.0
    logits[1] = 0.0
    logits[2, :] = float("-inf")
    logits[2, 299] = -3e38
    logits[3, 128] = 3e38
    assert draw(logits, state_of(4), filters=False) == [70, 0, 299, 128]


def test_rows_without_a_number_stay_inside_the_vocabulary() -> None:
    logits = torch.full((1, 300), float("-inf"), device=DEVICE)
    assert draw(logits, state_of(1), filters=False) == [299]


FILTERS = [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.7}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}, {"top_p": 1e-9},
]  # fmt: skip


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_filters_leave_what_the_host_sampler_leaves(options: dict[str, float], temperature: float) -> None:
    logits = torch.randn(1, 320, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    params = SamplingParams(temperature=temperature, **options)
    scores = (logits[0].double().cpu().numpy() - logits.max().item()) / temperature
    ids = np.arange(320)
    for keep in choose_filters(params):
        kept = keep(scores)
        ids, scores = ids[kept], scores[kept]
    state = state_of(1, temperature=temperature, seed=3, **options)
    seen = set()
    for count in range(15):
        state.count.fill_(count)
        seen |= set(draw(logits, state, filters=True))
    assert seen <= set(ids.tolist())
    assert len(seen) >= min(3, len(ids))
    # All that are allowed, by the threshold itself: the lowest allowed logit is kept, the next lower one is not.
    largest = torch.topk(logits, 320, dim=1).values
    sums = torch.exp((logits - largest[:, :1]) / temperature).sum(1)
    bound = torch.empty(1, device=DEVICE)
    sampling.threshold_kernel[(1,)](
        largest, sums, state.temperature, state.top_k, state.top_p, state.min_p, state.truncated, bound, 320, 320,
        BLOCK=512,
    )  # fmt: skip
    assert sorted((logits[0] >= bound * (1 - 1e-6 * bound.sign())).nonzero().flatten().tolist()) == sorted(ids.tolist())


def test_draws_follow_the_softmax() -> None:
    """1,000 rows with seeds of their own: every frequency within five standard deviations of its probability."""
    rows, temperature = 1000, 0.8
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, float("-inf"), 1.0], device=DEVICE).repeat(rows, 1)
    state = state_of(rows, temperature=temperature, seed=torch.arange(rows))
    counts = np.bincount(draw(logits, state, filters=False), minlength=8)
    expected = torch.softmax(logits[0] / temperature, 0).cpu().numpy()
    deviation = np.sqrt(rows * expected * (1 - expected))
    assert (np.abs(counts - rows * expected) <= 5 * deviation + 1e-9).all()


def test_a_draw_depends_on_seed_and_count_alone() -> None:
    logits = torch.zeros(1, 300, device=DEVICE)
    alone = [draw(logits, state_of(1, temperature=1.0, seed=2**62 + 5, count=i), filters=False)[0] for i in range(6)]
    assert len(set(alone)) > 3
    crowd = state_of(4, temperature=[1.0, 0.5, 1.0, 0.0], seed=[1, 2, 2**62 + 5, 3], count=[9, 9, 0, 9])
    for i in range(6):
        assert draw(logits.repeat(4, 1), crowd, filters=False)[2] == alone[i]
    other = [draw(logits, state_of(1, temperature=1.0, seed=6, count=i), filters=False)[0] for i in range(6)]
    assert other != alone


def test_a_nucleus_larger_than_the_candidates_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 16)
    logits = torch.zeros(2, 300, device=DEVICE)
    logits[1, 7] = 20.0
    state = state_of(2, temperature=1.0, top_p=0.9)
    draw(logits, state, filters=True)
    assert state.truncated.tolist() == [1, 0]


def test_a_top_k_beyond_the_candidates_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 16)
    logits = torch.zeros(2, 300, device=DEVICE)
    state = state_of(2, temperature=1.0, top_k=[17, 16])
    draw(logits, state, filters=True)
    assert state.truncated.tolist() == [1, 0]


def test_padding_does_not_move_on() -> None:
    state = state_of(2, live=[1, 0])
    ids, positions = (torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2))
    outputs = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        sampling.sample(torch.zeros(2, 300, device=DEVICE), state, ids, positions, outputs, filters=False)
    assert positions.tolist() == [3, 0] and state.count.tolist() == [3, 0]
