"""Every step of the sampler against its definition written out naively."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.errors import InputError, PersimmonError
from persimmon.infer import sampling
from persimmon.infer.params import SamplingParams
from persimmon.infer.sampling import Sampler, banned_ids, choose_filters, exact_top, min_p, top_k, top_p, uniform

NOTHING = np.array([], np.int64)

# A small grid of values makes ties common.
scores = st.lists(st.sampled_from([-3.0, -1.5, -0.25, 0.0, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=40).map(np.array)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def ranking(values: np.ndarray) -> list[int]:
    """Indices, best first, the first among equals first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def sampler(params: SamplingParams, size: int, banned: np.ndarray = NOTHING, **more: object) -> Sampler:
    return Sampler(params, banned, size, **more)


def draws(logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """`count` independent first tokens, one per seed."""
    values = logits.astype(np.float32)
    picked = [sampler(params.replace(seed=seed), len(values)).sample(values)[0] for seed in range(count)]
    return np.bincount(picked, minlength=len(values))


def assert_follows(counts: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's chi-square within 5 standard deviations; never a token of probability zero."""
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    total = counts.sum() * expected[likely]
    statistic = float(((counts[likely] - total) ** 2 / total).sum())
    freedom = int(likely.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * max(1, freedom)), statistic


# -- filters ------------------------------------------------------------------------------------------------


@given(values=scores, k=st.integers(1, 45))
def test_top_k_is_the_head_of_the_ranking(values: np.ndarray, k: int) -> None:
    assert set(np.flatnonzero(top_k(values, k))) == set(ranking(values)[:k])


@given(values=scores, p=st.floats(0.001, 0.999), first=st.sampled_from([1, 2, 4, 1024]))
def test_top_p_is_the_shortest_head_that_reaches_p(values: np.ndarray, p: float, first: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_TOP_P_FIRST", first)
        kept = set(np.flatnonzero(top_p(values, p)))
    likelihood, order = softmax(values), ranking(values)
    count = len(kept)
    assert kept == set(order[:count]) and count >= 1
    reached = likelihood[order[:count]].sum()
    before = likelihood[order[: count - 1]].sum()
    assert reached >= p - 1e-9 and before < p + 1e-9


@given(values=scores, p=st.floats(0.001, 1.0))
def test_min_p_is_relative_to_the_best(values: np.ndarray, p: float) -> None:
    likelihood = softmax(values)
    kept = min_p(values, p)
    clear = np.abs(likelihood / likelihood.max() - p) > 1e-9
    assert np.array_equal(kept[clear], (likelihood >= p * likelihood.max())[clear])
    assert kept[np.argmax(values)]


def test_filters_come_in_the_documented_order() -> None:
    params = SamplingParams(top_k=3, top_p=0.7, min_p=0.2)
    values = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    masks = []
    for keep in choose_filters(params):
        mask = keep(values)
        masks.append(mask.tolist())
        values = values[mask]
    # top-p works on what top-k left: 4/9 + 3/9 reaches 0.7, so the third goes.
    assert masks == [[True, True, True, False], [True, True, False], [True, True]]
    assert choose_filters(SamplingParams()) == []


# -- distribution -------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(0, 1.5, 12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = draws(LOGITS, SamplingParams(temperature=temperature), 4000)
    assert_follows(counts, softmax(LOGITS / temperature))


def test_draws_follow_the_filtered_and_renormalised_softmax() -> None:
    params = SamplingParams(temperature=1.3, top_k=6, top_p=0.8, min_p=0.05)
    expected = softmax(LOGITS / 1.3)
    for limit in ("top_k", "top_p", "min_p"):
        order, kept = np.argsort(-expected), np.zeros(len(expected), bool)
        if limit == "top_k":
            kept[order[:6]] = True
        elif limit == "top_p":
            kept[order[: int(np.searchsorted(np.cumsum(expected[order]), 0.8)) + 1]] = True
        else:
            kept = expected >= 0.05 * expected.max()
        expected = np.where(kept, expected, 0.0)
        expected /= expected.sum()
    assert_follows(draws(LOGITS, params, 4000), expected)


def test_the_tokens_of_one_request_are_independent_draws() -> None:
    one = sampler(SamplingParams(seed=5), 12)
    values = LOGITS.astype(np.float32)
    counts = np.bincount([one.sample(values)[0] for _ in range(4000)], minlength=12)
    assert_follows(counts, softmax(LOGITS))


@given(values=scores, temperature=st.sampled_from([1e-300, 1e-12]))
def test_a_tiny_temperature_is_greedy_up_to_ties(values: np.ndarray, temperature: float) -> None:
    token, _ = sampler(SamplingParams(temperature=temperature, seed=0), len(values)).sample(values.astype(np.float32))
    assert values[token] == values.max()


@given(values=scores)
def test_greedy_takes_the_first_of_the_best(values: np.ndarray) -> None:
    token, _ = sampler(SamplingParams(temperature=0), len(values)).sample(values.astype(np.float32))
    assert token == ranking(values)[0]


# -- bias and penalties -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    prompt=st.lists(st.integers(0, 11), max_size=8),
    generated=st.lists(st.integers(0, 11), max_size=8),
    repetition=st.sampled_from([1.0, 0.7, 1.5]),
    presence=st.sampled_from([0.0, -0.5, 1.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-5.0, 0.5, 3.0]), max_size=3),
)
def test_bias_then_penalties(
    prompt: list[int],
    generated: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    expected = LOGITS.astype(np.float32).astype(np.float64)
    for token in range(12):
        expected[token] += bias.get(token, 0.0)
        if token in prompt or token in generated:
            expected[token] *= repetition if expected[token] <= 0 else 1 / repetition
        if token in generated:
            expected[token] -= presence + frequency * generated.count(token)
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        logit_bias=bias,
    )  # fmt: skip
    one = sampler(params, 12, prompt_ids=prompt, generated_ids=generated)
    token, _ = one.sample(LOGITS.astype(np.float32))
    assert expected[token] == pytest.approx(expected.max())


def test_penalties_grow_with_what_is_picked() -> None:
    one = sampler(SamplingParams(temperature=0, frequency_penalty=1.0), 3)
    values = np.array([2.5, 1.0, 0.0], np.float32)
    assert [one.sample(values)[0] for _ in range(4)] == [0, 0, 1, 0]  # 2.5, 1.5, then 0.5 against 1.0, a half later


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="token 12; the vocabulary has 12"):
        sampler(SamplingParams(logit_bias={12: 1.0}), 12)


# -- seeds --------------------------------------------------------------------------------------------------


def test_the_stream_of_a_seed_never_changes() -> None:
    """Golden values: a seed must give the same text in every version."""
    assert [uniform(seed, counter) for seed, counter in ((0, 0), (0, 1), (7, 0), (-1, 3))] == GOLDEN


GOLDEN = [0.011546754286331562, 0.5023796042735054, 0.8720734548204873, 0.10224385374061784]


def test_same_seed_same_tokens_and_another_seed_others() -> None:
    values = np.zeros(1000, np.float32)
    runs = [
        [s.sample(values)[0] for _ in range(20)] for s in (sampler(SamplingParams(seed=s), 1000) for s in (3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_without_a_seed_the_one_that_was_drawn_repeats_the_run() -> None:
    values = np.zeros(1000, np.float32)
    first = sampler(SamplingParams(), 1000)
    tokens = [first.sample(values)[0] for _ in range(5)]
    again = sampler(SamplingParams(seed=first.seed), 1000)
    assert tokens == [again.sample(values)[0] for _ in range(5)]
    assert sampler(SamplingParams(), 1000).seed != first.seed


@given(pause=st.integers(0, 10), seed=st.integers(-(2**63), 2**64 - 1))
def test_pausing_and_resuming_changes_nothing(pause: int, seed: int) -> None:
    params = SamplingParams(seed=seed, frequency_penalty=0.5, repetition_penalty=1.2)
    values = np.random.default_rng(1).normal(size=50).astype(np.float32)
    whole = sampler(params, 50, prompt_ids=[1, 2])
    expected = [whole.sample(values)[0] for _ in range(10)]
    resumed = sampler(params, 50, prompt_ids=[1, 2], generated_ids=expected[:pause])
    assert [resumed.sample(values)[0] for _ in range(10 - pause)] == expected[pause:]


# -- what may be picked -------------------------------------------------------------------------------------


@dataclass
class FakeVocabulary:
    vocab_size: int = 8
    eos_id: int = 1
    special_ids: frozenset[int] = field(default_factory=lambda: frozenset({0, 1, 5, 9}))


def test_banned_are_special_ids_and_rows_above_the_tokenizer_but_not_end_of_text() -> None:
    assert banned_ids(FakeVocabulary(), 11).tolist() == [0, 5, 8, 9, 10]
    assert banned_ids(FakeVocabulary(), 8).tolist() == [0, 5]


def test_banned_ids_are_never_picked() -> None:
    banned = banned_ids(FakeVocabulary(), 11)
    values = np.zeros(11, np.float32)
    values[banned] = 50.0
    picked = {sampler(SamplingParams(seed=seed), 11, banned).sample(values)[0] for seed in range(300)}
    assert picked == {1, 2, 3, 4, 6, 7}
    assert sampler(SamplingParams(temperature=0, logit_bias={5: 100}), 11, banned).sample(values)[0] == 1


@pytest.mark.parametrize("bad", [[np.nan, 0, 1], [np.inf, 0, 1], [-np.inf] * 3])
def test_unusable_logits_are_an_error(bad: list[float]) -> None:
    with pytest.raises(PersimmonError, match="no usable logits"):
        sampler(SamplingParams(), 3).sample(np.array(bad, np.float32))


# -- engines that keep only the largest logits exact --------------------------------------------------------


def test_exact_top_says_what_is_needed() -> None:
    assert exact_top(SamplingParams(temperature=0)) == 1
    assert exact_top(SamplingParams(temperature=0), num_banned=3) == 4
    assert exact_top(SamplingParams(top_k=40, top_p=0.9)) == 40
    for all_needed in (
        {}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 4, "logprobs": 0}, {"temperature": 0, "logit_bias": {1: 1.0}},
        {"temperature": 0, "repetition_penalty": 1.1}, {"top_k": 5, "presence_penalty": 0.1},
    ):  # fmt: skip
        assert exact_top(SamplingParams(**all_needed)) is None


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12, unique=True),
    params=st.sampled_from(
        [SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams(top_k=6, top_p=0.7, min_p=0.1)]
    ),
    seed=st.integers(0, 99),
)
def test_minus_infinity_outside_the_exact_top_changes_nothing(
    values: list[float], params: SamplingParams, seed: int
) -> None:
    banned = np.array([2, 7])
    full = np.array(values, np.float32)
    one, other = (sampler(params.replace(seed=seed), 12, banned) for _ in range(2))
    cut = np.full(12, -np.inf, np.float32)
    best = np.argsort(-full)[: one.exact_top]
    cut[best] = full[best]
    assert one.sample(full)[0] == other.sample(cut)[0]


# -- log-probabilities --------------------------------------------------------------------------------------


@given(values=scores, count=st.integers(0, 20))
def test_log_probabilities_are_those_of_the_raw_distribution(values: np.ndarray, count: int) -> None:
    params = SamplingParams(temperature=0.3, logit_bias={0: 9.0}, top_k=2, logprobs=count, seed=1)
    token, report = sampler(params, len(values)).sample(values.astype(np.float32))
    expected = np.log(softmax(values))
    assert report is not None and report.token_id == token
    assert report.logprob == pytest.approx(expected[token], abs=1e-12)
    order = ranking(values)[:count]
    assert [i for i, _ in report.alternatives] == order
    assert [v for _, v in report.alternatives] == pytest.approx(expected[order], abs=1e-12)
    assert all(v == report.logprob for i, v in report.alternatives if i == token)  # identical, not merely close


def test_log_probabilities_sum_to_one() -> None:
    _, report = sampler(SamplingParams(logprobs=12), 12).sample(LOGITS.astype(np.float32))
    assert report is not None
    assert sum(math.exp(value) for _, value in report.alternatives) == pytest.approx(1.0)
