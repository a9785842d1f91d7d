"""Guessing from the text: right guesses save calls, wrong ones change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_decoders import cpu_decoder
from persimmon.api import Persimmon
from persimmon.errors import InputError
from persimmon.infer.completion import Generation
from persimmon.infer.decoder import Chunk, Decoder
from persimmon.infer.lookup import LONGEST, Lookup
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

MODEL = tiny_model(max_positions=256)
TOKENIZER = tiny_tokenizer()
DECODERS: dict[str, Callable[[], Decoder]] = {
    "cpu": lambda: cpu_decoder(MODEL),
    "cpu, int8, 2 threads": lambda: cpu_decoder(MODEL, kv_dtype="int8", threads=2),
    "reference": lambda: ReferenceDecoder(MODEL),
}
IDS = st.integers(3, TOKENIZER.vocab_size - 1)
# Few different tokens, so that runs come back.
PROMPTS = st.lists(st.sampled_from([5, 9, 30, 31]) | IDS, min_size=1, max_size=60)


@pytest.fixture(params=DECODERS, scope="module")
def model(request: pytest.FixtureRequest) -> Persimmon:
    return Persimmon(DECODERS[request.param](), TOKENIZER)


def naive_guess(ids: list[int], count: int) -> list[int]:
    for length in range(LONGEST, 0, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[len(ids) - length :]:
                return ids[end : end + count]
    return []


@given(ids=st.lists(st.integers(0, 3), max_size=40), count=st.integers(0, 8))
def test_guesses_are_what_followed_last_time(ids: list[int], count: int) -> None:
    assert Lookup(ids).guess(count) == naive_guess(ids, count)


def same(result: Generation, plain: Generation) -> None:
    assert (result.token_ids, result.text) == (plain.token_ids, plain.text)
    assert (result.finish_reason, result.stop, result.logprobs) == (plain.finish_reason, plain.stop, plain.logprobs)
    assert 0 <= result.usage.accepted_tokens <= result.usage.guessed_tokens


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=PROMPTS, lookup=st.integers(1, 12), max_tokens=st.integers(1, 40))
def test_greedy_answers_are_the_same(model: Persimmon, prompt: list[int], lookup: int, max_tokens: int) -> None:
    plain = model.generate(prompt, max_tokens=max_tokens, temperature=0.0)
    same(model.generate(prompt, max_tokens=max_tokens, temperature=0.0, lookup=lookup), plain)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=PROMPTS,
    lookup=st.integers(1, 12),
    sampling=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0]),
            "seed": st.integers(0, 99),
            "top_p": st.sampled_from([0.8, 1.0]),
            "top_k": st.sampled_from([0, 5]),
            "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3]),
            "frequency_penalty": st.sampled_from([-1.0, 0.0]),
            "logprobs": st.sampled_from([None, 2]),
            "stop": st.sampled_from([(), ("e",), ("the", "st")]),
            "logit_bias": st.sampled_from([{}, {30: 8.0, 31: 8.0}]),
            "context_overflow": st.sampled_from(["error", "shift"]),
        }
    ),
)
def test_everything_else_is_the_same_too(prompt: list[int], lookup: int, sampling: dict[str, Any]) -> None:
    """Seeds, penalties, filters, stops, log-probabilities and a context of 80 tokens that may overflow."""
    model = Persimmon(cpu_decoder(MODEL), TOKENIZER, context=80)
    same(
        model.generate(prompt, max_tokens=60, lookup=lookup, **sampling),
        model.generate(prompt, max_tokens=60, **sampling),
    )


def test_the_text_to_look_in_goes_on_where_the_context_is_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[int]] = []
    append = Lookup.append

    def noted(lookup: Lookup, token_id: int) -> None:
        append(lookup, token_id)
        texts.append(list(lookup._token_ids))

    monkeypatch.setattr(Lookup, "append", noted)
    model = Persimmon(cpu_decoder(MODEL), TOKENIZER, context=24)
    prompt = [5, 9, 30, 31] * 5
    result = model.generate(
        prompt, lookup=4, max_tokens=60, temperature=0.0, context_overflow="shift", logit_bias={TOKENIZER.eos_id: -100}
    )
    assert len(result.token_ids) == 60
    assert texts[-1] == [*prompt, *result.token_ids[:-1]], "the last token is looked for by nobody"


def test_right_guesses_save_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy answer that runs in circles is guessed; counts say so."""
    decoder = cpu_decoder(MODEL)
    calls: list[int] = []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda chunks, **k: calls.append(1) or forward(chunks, **k))
    model = Persimmon(decoder, TOKENIZER)
    prompt, sampling = [5, 9, 30] * 4, {"max_tokens": 100, "temperature": 0.0, "logit_bias": {1: -100.0}}
    plain = model.generate(prompt, **sampling)
    assert len(calls) == 100 and plain.usage.guessed_tokens == 0
    calls.clear()
    guessed = model.generate(prompt, lookup=8, **sampling)
    same(guessed, plain)
    assert guessed.usage.accepted_tokens > 20 and len(calls) == 100 - guessed.usage.accepted_tokens


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("size", [2, 3, 7, 33])
def test_logits_of_a_block_are_those_of_single_steps(kv_dtype: str, size: int) -> None:
    decoder = cpu_decoder(MODEL, kv_dtype=kv_dtype)
    ids = np.random.default_rng(size).integers(0, MODEL.config.vocab_size, 40 + size).tolist()
    single, block = decoder.new_sequence(100), decoder.new_sequence(100)
    for sequence in (single, block):
        decoder.forward([Chunk(sequence, ids[:40], "none")])
    steps = [decoder.forward([Chunk(single, [token])])[0] for token in ids[40:]]
    (rows,) = decoder.forward([Chunk(block, ids[40:], "all")])
    np.testing.assert_array_equal(rows, np.stack(steps))


CHOICES = (5, 9, 30, 31)
SAMPLING = {
    "temperature": 6.0,
    "logit_bias": {i: -100.0 for i in range(MODEL.config.vocab_size) if i not in CHOICES} | {30: 2.0},
}


def check_distribution(model: Persimmon, before: list[int], found: list[int]) -> None:
    """Chi-square of sampled tokens against the softmax of the model's logits behind `before`."""
    logits = model.logits(before)[0, -1].numpy().astype(np.float64)
    scores = np.array([logits[i] + SAMPLING["logit_bias"].get(i, 0.0) for i in CHOICES]) / SAMPLING["temperature"]
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() * len(found)
    observed = np.array([found.count(i) for i in CHOICES])
    assert observed.sum() == len(found)
    usable = expected > 5
    assert usable.sum() >= 2, "a choice that is no choice tests nothing"
    # 16.3 with 3 degrees of freedom: 1 in 1,000; the seeds are fixed.
    assert ((observed - expected)[usable] ** 2 / expected[usable]).sum() < 16.3


def test_sampled_tokens_have_the_models_distribution() -> None:
    """2,000 seeds: the token that a guess stands for, and the one behind a right guess."""
    model = Persimmon(cpu_decoder(MODEL), TOKENIZER)
    prompt = [5, 9, 30, 31, 5, 9, 30, 31, 5, 9]
    results = [model.generate(prompt, seed=seed, lookup=1, max_tokens=3, **SAMPLING) for seed in range(2_000)]
    right = sum(result.usage.accepted_tokens for result in results)
    assert 0 < right < sum(result.usage.guessed_tokens for result in results)
    first = Counter(r.token_ids[0] for r in results).most_common(1)[0][0]
    check_distribution(model, prompt, [r.token_ids[0] for r in results])
    check_distribution(model, [*prompt, first], [r.token_ids[1] for r in results if r.token_ids[0] == first])
    guessed = [r for r in results if r.usage.accepted_tokens]
    start = Counter(tuple(r.token_ids[:2]) for r in guessed).most_common(1)[0][0]
    check_distribution(model, [*prompt, *start], [r.token_ids[2] for r in guessed if tuple(r.token_ids[:2]) == start])


def test_limits() -> None:
    model = Persimmon(cpu_decoder(MODEL), TOKENIZER)
    for lookup in (-1, 65):
        with pytest.raises(InputError, match="lookup must be from 0 to 64"):
            model.generate([5], lookup=lookup)
