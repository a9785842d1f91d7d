"""Scores and texts equal those of the plainest possible computation, whatever the lanes and batches."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.errors import InputError
from persimmon.evals.language_model import DecoderLanguageModel
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Score, TokenLikelihoods
from persimmon.infer.decoder import Chunk, Logits
from persimmon.infer.reference import ReferenceDecoder
from persimmon.tokenizer import split_continuation
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

MODEL = tiny_model()
TOKENIZER = tiny_tokenizer()
TEXTS = st.text(alphabet="thea story\nof:. ä", min_size=1, max_size=30)


def language_model(**changes: object) -> DecoderLanguageModel:
    return DecoderLanguageModel(ReferenceDecoder(MODEL), TOKENIZER, **changes)  # type: ignore[arg-type]


def plain_logits(ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return MODEL(torch.tensor([list(ids)]))[0]


def plain_score(context: str, continuation: str) -> tuple[float, bool]:
    before, after = split_continuation(TOKENIZER, context, continuation)
    before = [TOKENIZER.bos_id, *before]
    rows = plain_logits([*before, *after])[len(before) - 1 : -1].double().log_softmax(-1)
    picked = rows[range(len(after)), after].sum()
    return float(picked), rows.argmax(-1).tolist() == after


@settings(max_examples=25)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12), st.integers(1, 5))
def test_scores_equal_one_plain_forward_each(pairs: list[tuple[str, str]], lanes: int) -> None:
    answers = language_model(lanes=lanes).respond([Score(*pair) for pair in pairs])
    for pair, answer in zip(pairs, answers, strict=True):
        assert isinstance(answer, Likelihood)
        expected, greedy = plain_score(*pair)
        assert answer.log_probability == pytest.approx(expected, abs=1e-3)
        assert answer.greedy == greedy


class CountingDecoder(ReferenceDecoder):
    def __init__(self) -> None:
        super().__init__(MODEL)
        self.tokens = self.calls = self.open = 0

    def new_sequence(self, capacity: int):  # type: ignore[no-untyped-def]
        self.open += 1
        sequence = super().new_sequence(capacity)
        close = sequence.close

        def closing() -> None:
            self.open -= 1
            close()

        sequence.close = closing  # type: ignore[method-assign]
        return sequence

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        self.tokens += sum(len(chunk.token_ids) for chunk in chunks)
        self.calls += 1
        return super().forward(chunks, exact_top=exact_top)


def test_common_beginnings_are_read_once() -> None:
    decoder = CountingDecoder()
    model = DecoderLanguageModel(decoder, TOKENIZER, lanes=2)
    head = "the story of light " * 20
    requests = [Score(f"{head}{number}:", f" {choice}") for number in range(6) for choice in "abcd"]
    model.respond(requests)
    length = len(TOKENIZER.encode(head))
    assert decoder.tokens < 2 * length + 24 * 8
    assert decoder.open == 0


def test_lanes_go_together() -> None:
    decoder = CountingDecoder()
    DecoderLanguageModel(decoder, TOKENIZER, lanes=16).respond([Score(f"{n} {n}:", " the") for n in range(16)])
    assert decoder.calls == 2


def test_the_cache_limit_holds() -> None:
    decoder = CountingDecoder()
    model = DecoderLanguageModel(decoder, TOKENIZER, lanes=16, cache_tokens=100)
    opened: list[int] = []
    make = decoder.new_sequence
    decoder.new_sequence = lambda capacity: (opened.append(capacity), make(capacity))[1]  # type: ignore[method-assign]
    model.respond([Score("the story of " * n, "light") for n in range(1, 9)])
    assert len(opened) >= 1 and sum(opened) <= 100


def plain_greedy(prompt: str, stop: tuple[str, ...], limit: int) -> str:
    ids, text = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)], b""
    for _ in range(limit):
        token = int(plain_logits(ids)[-1, : TOKENIZER.vocab_size].argmax())
        if token == TOKENIZER.eos_id:
            break
        ids.append(token)
        text += TOKENIZER.piece_bytes(token)
        decoded = text.decode(errors="replace")
        ends = [decoded.find(s) for s in stop if s in decoded]
        if ends:
            return decoded[: min(ends)]
    return text.decode(errors="replace")


@settings(max_examples=10)
@given(st.lists(TEXTS, min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 24))
def test_texts_equal_one_plain_greedy_loop_each(prompts: list[str], lanes: int, limit: int) -> None:
    stop = ("e", "\n")
    answers = language_model(lanes=lanes).respond([Generate(prompt, stop, limit) for prompt in prompts])
    assert answers == [[plain_greedy(prompt, stop, limit)] for prompt in prompts]


def test_samples_depend_on_seed_and_copy_only() -> None:
    requests = [Generate("the story", (), 8, count=3, temperature=1.0), Generate("of light", (), 8, temperature=1.0)]
    first = language_model(seed=1).respond(requests)
    assert first == language_model(seed=1, lanes=1).respond(requests)
    assert first[0] == language_model(seed=1).respond(requests[:1])[0]
    assert first != language_model(seed=2).respond(requests)
    assert isinstance(first[0], list) and len(set(first[0])) == 3


def test_samples_follow_the_softmax() -> None:
    model = language_model(seed=3)
    (answer,) = model.respond([Generate("the", (), 1, count=1500, temperature=0.5)])
    assert isinstance(answer, list)
    probabilities = (plain_logits([TOKENIZER.bos_id, *TOKENIZER.encode("the")])[-1].double() / 0.5).softmax(-1)
    best = int(probabilities.argmax())
    text = TOKENIZER.piece_bytes(best).decode(errors="replace")
    same = [t for t in range(TOKENIZER.vocab_size) if TOKENIZER.piece_bytes(t).decode(errors="replace") == text]
    expected = float(probabilities[same].sum())
    assert answer.count(text) / 1500 == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 1500))


def test_measure_gives_every_token_and_the_bytes() -> None:
    text = "the story of light\n" * 60 + "ä."
    (answer,) = language_model().respond([Measure(text)])
    assert isinstance(answer, TokenLikelihoods)
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    rows = plain_logits(ids[:-1]).double().log_softmax(-1)
    expected = rows[range(len(ids) - 1), ids[1:]].numpy()
    np.testing.assert_allclose(np.asarray(answer.log_probabilities), expected, atol=1e-3)
    assert answer.num_bytes == len(text.encode())


def test_what_does_not_fit_loses_its_beginning_and_is_counted() -> None:
    model = DecoderLanguageModel(ReferenceDecoder(tiny_model(max_positions=32)), TOKENIZER)
    long = "the story of light " * 20
    (short_score,) = model.respond([Score("the story", " of")])
    assert model.truncated == 0 and isinstance(short_score, Likelihood)
    model.respond([Score(long, " a"), Generate(long, (), 8), Measure(long)])
    assert model.truncated == 3
    with pytest.raises(InputError, match="32"):
        model.respond([Score("a", long)])
    with pytest.raises(InputError, match="max_tokens 32"):
        model.respond([Generate("a", (), 32)])


def test_without_opening_token_and_without_context() -> None:
    model = language_model(bos=False)
    (answer,) = model.respond([Score("", "the story")])
    assert isinstance(answer, Likelihood)
    assert answer.log_probability == pytest.approx(plain_score("", "the story")[0], abs=1e-3)
    ids = TOKENIZER.encode("the story")
    (answer,) = model.respond([Score("the", " story")])
    assert isinstance(answer, Likelihood)
    expected = float(plain_logits(ids)[-2].double().log_softmax(-1)[ids[-1]])
    assert answer.log_probability == pytest.approx(expected, abs=1e-3)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="lanes"):
        language_model(lanes=0)
