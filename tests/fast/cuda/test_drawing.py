"""Tokens picked on the device: the host's where nothing is random, the same alone and in a crowd where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import triton_interpreter  # noqa: F401 - skips without triton
from cuda_decoders import cuda_decoder
from persimmon.api import Persimmon
from persimmon.errors import PersimmonError
from persimmon.fast.cuda.kernels import sampling as kernels
from persimmon.infer.decoder import Chunk
from persimmon.infer.drawing import Draw, DrawingDecoder, can_draw
from persimmon.infer.engine import Engine, Request
from persimmon.infer.paged import page
from persimmon.infer.params import SamplingParams
from persimmon.infer.reference import ReferenceDecoder
from persimmon.infer.sampling import Sampler, banned_ids
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(max_positions=128)
BANNED = banned_ids(TOKENIZER, MODEL.config.vocab_size)
TOKENS = 10
PROMPTS = ["the story", "a b c", "light and the letters", "x"]


def persimmon(**options: Any) -> Persimmon:
    return Persimmon(cuda_decoder(MODEL, cache_tokens=256), TOKENIZER, **options)


@pytest.fixture
def no_host_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("the host sampled"))


def request(name: str, prompt: str, **params: Any) -> Request:
    return Request(name, tuple(TOKENIZER.encode(prompt, bos=True)), SamplingParams(**{"max_tokens": TOKENS, **params}))


def engine(blocks: int = 64) -> Engine:
    return Engine(page(cuda_decoder(MODEL, cache_tokens=64), blocks, 8, max_sequences=8), TOKENIZER, step_tokens=16)


def answers(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in requests:
        engine.submit(one)
    while engine.busy:
        for update in engine.step():
            assert update.failure is None, update.failure
            found.setdefault(update.request_id, []).extend(update.piece.token_ids if update.piece else ())
    return found


def test_what_a_device_picks() -> None:
    assert isinstance(cuda_decoder(MODEL), DrawingDecoder) and not isinstance(ReferenceDecoder(MODEL), DrawingDecoder)
    yes = [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"stop": ("x",), "seed": 3}]
    no = [{"logprobs": 0}, {"logit_bias": {5: 1.0}}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1},
          {"temperature": 1e-5}]  # fmt: skip
    assert all(can_draw(SamplingParams(**params)) for params in yes)
    assert not any(can_draw(SamplingParams(**params)) for params in no)


def test_greedy_answers_are_the_references_and_no_logits_come_to_the_host(no_host_sampling: None) -> None:
    ours = [persimmon().generate(prompt, temperature=0, max_tokens=TOKENS).token_ids for prompt in PROMPTS[:2]]
    in_a_crowd = answers(engine(), [request(prompt, prompt, temperature=0.0) for prompt in PROMPTS[:2]])
    assert ours == [in_a_crowd[prompt] for prompt in PROMPTS[:2]]
    expected = ReferenceDecoder(MODEL)
    for prompt, ids in zip(PROMPTS, ours, strict=False):
        text = TOKENIZER.encode(prompt, bos=True)
        for token in ids:
            (logits,) = expected.forward([Chunk(expected.new_sequence(len(text)), text)])
            assert logits is not None
            logits[BANNED] = -np.inf
            assert token == int(logits.argmax())
            text.append(token)


SAMPLING = [
    {"temperature": 1.0, "seed": 2},
    {"temperature": 1.5, "top_k": 20, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    {"temperature": 2.0, "frequency_penalty": 0.5, "seed": 1},  # the host's
]


def test_same_seed_same_tokens_alone_in_a_crowd_and_after_a_pause() -> None:
    """Also beside rows that the host samples, with too few blocks for all, and taken up again in the middle."""
    requests = [request(p, p, **s) for p, s in zip(PROMPTS, SAMPLING, strict=True)]
    model = persimmon()
    alone = {p: model.generate(p, max_tokens=TOKENS, **s).token_ids for p, s in zip(PROMPTS, SAMPLING, strict=True)}
    assert all(len(ids) == TOKENS for ids in alone.values()), "answers that end at once test nothing"
    assert answers(engine(), requests) == alone
    assert answers(engine(), requests[:3]) == {name: alone[name] for name in PROMPTS[:3]}
    few = engine(blocks=5)
    assert answers(few, requests) == alone and few.state.preemptions > 0
    first, *_ = requests
    again = Request(first.id, first.prompt_ids, first.params, replayed=tuple(alone[first.id][:3]))
    assert answers(engine(), [again]) == {first.id: alone[first.id][3:]}


def test_seeds_differ_and_a_shifted_context_repeats_no_noise(no_host_sampling: None) -> None:
    model = persimmon(context=16)
    options: dict[str, Any] = {"temperature": 3.0, "max_tokens": 24, "context_overflow": "shift"}
    first, same, other = (model.generate("a b c", seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert first == same != other


def test_draws_have_the_models_distribution() -> None:
    decoder = cuda_decoder(MODEL, cache_tokens=2048)
    assert isinstance(decoder, DrawingDecoder)
    ids, params = [5, 9, 30], SamplingParams(temperature=1.0, top_k=4)
    sequences = [decoder.new_sequence(8) for _ in range(32)]
    found: Counter[int] = Counter()
    for batch in range(6):
        for sequence in sequences:
            sequence.truncate(0)
        decoder.forward([Chunk(sequence, ids[:2], "none") for sequence in sequences])
        draws = [Draw(params, 1_000 * batch + row, 0) for row in range(32)]
        found.update(decoder.draw([Chunk(sequence, ids[2:]) for sequence in sequences], draws, BANNED))
    (logits,) = ReferenceDecoder(MODEL).forward([Chunk(ReferenceDecoder(MODEL).new_sequence(3), ids)])
    assert logits is not None
    logits[BANNED] = -np.inf
    best = np.argsort(-logits)[:4]
    expected = np.exp(logits[best] - logits[best].max())
    expected *= sum(found.values()) / expected.sum()
    observed = np.array([found[int(token)] for token in best])
    assert observed.sum() == 6 * 32
    # 16.3 with 3 degrees of freedom: 1 in 1,000; the seeds are fixed.
    assert ((observed - expected) ** 2 / expected).sum() < 16.3


def test_what_the_device_is_unsure_of_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", 4)
    decoder = cuda_decoder(MODEL, cache_tokens=256)
    wide, narrow = SamplingParams(top_p=0.99, temperature=3.0), SamplingParams(top_k=2)
    for size in (1, 3):  # a step of single tokens, a pass
        chunks = [Chunk(decoder.new_sequence(8), [5, 9, 30][:size]) for _ in range(2)]
        unsure, sure = decoder.draw(chunks, [Draw(wide, 1, 0), Draw(narrow, 1, 0)], BANNED)
        assert isinstance(unsure, np.ndarray) and unsure.shape == (MODEL.config.vocab_size,) and isinstance(sure, int)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    broken = tiny_model(max_positions=128)
    broken.lm_head.weight.data[7] = float("nan")
    model = Persimmon(cuda_decoder(broken, cache_tokens=128), TOKENIZER)
    with pytest.raises(PersimmonError, match="no usable logits"):
        model.generate("a b c", temperature=0, max_tokens=3)
