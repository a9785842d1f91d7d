"""Greedy tokens that the CPU engine picks itself: the host's, and the host looks wherever it could matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpu_decoders import cpu_decoder
from persimmon.api import Persimmon
from persimmon.errors import PersimmonError
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.infer.decoder import Chunk
from persimmon.infer.drawing import Draw, DrawingDecoder
from persimmon.infer.engine import Engine, Request
from persimmon.infer.paged import page
from persimmon.infer.params import SamplingParams
from persimmon.infer.sampling import Sampler
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(max_positions=128)
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = ["the story", "a b c", "light and the letters"]


def answers(engine: Engine, params: list[dict[str, Any]]) -> list[list[int]]:
    """Of the prompts, all at once."""
    for number, (prompt, more) in enumerate(zip(PROMPTS, params, strict=True)):
        ids = tuple(TOKENIZER.encode(prompt, bos=True))
        engine.submit(Request(str(number), ids, SamplingParams(temperature=0.0, max_tokens=10, **more)))
    found: dict[str, list[int]] = {}
    while engine.busy:
        for update in engine.step():
            assert update.failure is None, update.failure
            found.setdefault(update.request_id, []).extend(update.piece.token_ids if update.piece else ())
    return [found[name] for name in sorted(found)]


def engine() -> Engine:
    return Engine(page(cpu_decoder(MODEL), 64, 16, max_sequences=8), TOKENIZER, step_tokens=16)


def test_greedy_answers_are_the_hosts_and_few_logits_leave_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of steps where a banned token is the likeliest."""
    with monkeypatch.context() as host:
        host.setattr(CpuDecoder, "can_draw", lambda *_: False)
        expected = [
            Persimmon(cpu_decoder(MODEL), TOKENIZER).generate(p, temperature=0, max_tokens=10).token_ids
            for p in PROMPTS
        ]
    sampled: list[object] = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *rest: sampled.append(rest) or sample(self, *rest))
    model = Persimmon(cpu_decoder(MODEL), TOKENIZER)
    assert [model.generate(p, temperature=0, max_tokens=10).token_ids for p in PROMPTS] == expected
    assert len(sampled) < sum(map(len, expected)) / 2
    assert answers(engine(), [{}, {}, {}]) == expected


def test_requests_that_need_logits_run_beside_those_that_do_not() -> None:
    alone = answers(engine(), [{}, {}, {}])
    assert answers(engine(), [{}, {"logprobs": 2}, {"logit_bias": {5: 0.0}}]) == alone


def test_what_it_picks() -> None:
    decoder = cpu_decoder(MODEL)
    assert isinstance(decoder, DrawingDecoder) and decoder.can_draw(GREEDY)
    for other in ({"temperature": 1.0}, {"logprobs": 1}, {"logit_bias": {5: 1.0}}, {"repetition_penalty": 1.1}):
        assert not decoder.can_draw(SamplingParams(**{"temperature": 0.0, **other}))


def test_a_banned_token_brings_the_logits_and_the_cache_stays_right() -> None:
    decoder, other = cpu_decoder(MODEL), cpu_decoder(MODEL)
    sequence, same = decoder.new_sequence(16), other.new_sequence(16)
    ids = [5, 9, 30]
    (expected,) = other.forward([Chunk(same, ids)])
    assert expected is not None
    best = int(expected.argmax())
    draw = Draw(GREEDY, 0, 0)
    (found,) = decoder.draw([Chunk(sequence, ids)], [draw], np.array([best]))
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected)
    (following,) = other.forward([Chunk(same, [best])])
    assert decoder.draw([Chunk(sequence, [best])], [draw], np.empty(0, np.int64)) == [int(following.argmax())]
    assert sequence.length == same.length == 4


def test_what_is_no_number_is_an_error_as_on_the_host() -> None:
    broken = tiny_model(max_positions=128)
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(PersimmonError, match="no usable logits"):
        Persimmon(cpu_decoder(broken), TOKENIZER).generate("a b c", temperature=0, max_tokens=3)
