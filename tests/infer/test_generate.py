"""Streams: text, tokens, ends, context overflow, sessions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.errors import ContextLengthError, InputError
from persimmon.infer.completion import Completion, Generation, Piece
from persimmon.infer.decoder import CachedSequence, Chunk, Decoder
from persimmon.infer.drawing import MOST_AHEAD, steps_ahead
from persimmon.infer.generate import Stream, fit_prompt, newest
from persimmon.infer.params import SamplingParams
from persimmon.infer.reference import ReferenceDecoder
from persimmon.infer.sampling import banned_ids
from persimmon.infer.session import PREFILL_CHUNK, Session
from scripted_decoder import ScriptedDecoder, ScriptedGreedyDecoder, says
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model()
DECODER = ReferenceDecoder(MODEL)
EOS = TOKENIZER.eos_id
NO_END = {EOS: -100.0}
PROMPT = TOKENIZER.encode("the story of", bos=True)


def generate(
    decoder: Decoder,
    prompt: list[int],
    *,
    session: Session | None = None,
    context: int | None = None,
    **sampling: object,
) -> Generation:
    stream = Stream(decoder, TOKENIZER, prompt, SamplingParams(**sampling), session=session, context=context)
    for _ in stream:
        pass
    return stream.result()


def answer(text: str, **sampling: object) -> tuple[list[Piece], Generation]:
    """Stream a model that says `text` and then end-of-text."""
    ids = [*TOKENIZER.encode(text), EOS]
    stream = Stream(
        says(len(PROMPT), ids), TOKENIZER, PROMPT, SamplingParams(**{"temperature": 0, **sampling}), context=200
    )
    return list(stream), stream.result()


# -- text and ends ------------------------------------------------------------------------------------------


def test_an_answer_up_to_end_of_text() -> None:
    pieces, result = answer(" a light. ä é")
    assert result.text == " a light. ä é"
    assert result.token_ids == [*TOKENIZER.encode(" a light. ä é"), EOS]
    assert (result.finish_reason, result.stop) == ("stop", None)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(PROMPT), len(result.token_ids))
    assert result.usage.total_tokens == len(PROMPT) + len(result.token_ids)
    assert pieces[0] == Piece(" a", (TOKENIZER.encode(" a")[0],))
    assert pieces[-1].token_ids == (EOS,)


def test_a_character_in_several_tokens_comes_whole() -> None:
    pieces, _ = answer("é✓")
    assert [(piece.text, len(piece.token_ids)) for piece in pieces] == [("é", 2), ("✓", 3), ("", 1)]


def test_half_a_character_at_the_end_is_a_replacement_character() -> None:
    _, result = answer("aé", max_tokens=2)
    assert (result.text, result.finish_reason) == ("a\N{REPLACEMENT CHARACTER}", "length")


def test_max_tokens() -> None:
    pieces, result = answer("story", max_tokens=3)
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("sto", "length", 3)
    assert "".join(piece.text for piece in pieces) == "sto"


def test_a_stop_string_ends_the_text_before_it_and_never_shows() -> None:
    pieces, result = answer("light.\n\nhuman: more", stop=("\n\nhuman:",))
    assert (result.text, result.finish_reason, result.stop) == ("light.", "stop", "\n\nhuman:")
    assert all("\n" not in piece.text for piece in pieces)
    assert result.token_ids == TOKENIZER.encode("light.\n\nhuman:")


def test_a_held_back_beginning_of_a_stop_string_comes_out_at_the_end() -> None:
    for limit in (50, 8):
        pieces, result = answer("light.\n\n", stop=("\n\nhuman:",), max_tokens=limit)
        assert result.text == "light.\n\n"
        assert [piece.text for piece in pieces if piece.text][-1] == "\n\n"


def test_the_chat_formats_space_can_be_skipped() -> None:
    for text, expected in ((" the light", "the light"), ("light", "light"), ("  a", " a"), (" ", "")):
        decoder = says(len(PROMPT), [*TOKENIZER.encode(text), EOS])
        stream = Stream(decoder, TOKENIZER, PROMPT, SamplingParams(temperature=0), skip_space=True)
        assert "".join(piece.text for piece in stream) == stream.result().text == expected


def test_a_completion_keeps_the_space_between_it_and_the_prompt() -> None:
    """Vocabularies that swallow a text's first space do so at the head of a document only."""
    release_like = tiny_tokenizer(add_dummy_prefix=True)
    ids = [*TOKENIZER.encode(" the"), EOS]
    for prompt, expected in (([EOS, *TOKENIZER.encode("a")], " the"), ([EOS], "the")):
        stream = Stream(says(len(prompt), ids), release_like, prompt, SamplingParams(temperature=0))
        assert "".join(piece.text for piece in stream) == expected


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    stop=st.lists(st.text("aeo .", min_size=1, max_size=3), max_size=3).map(tuple),
    logprobs=st.sampled_from([None, 0, 3]),
)
def test_pieces_together_are_the_result(seed: int, stop: tuple[str, ...], logprobs: int | None) -> None:
    params = SamplingParams(max_tokens=30, temperature=3.0, seed=seed, stop=stop, logprobs=logprobs)
    stream = Stream(DECODER, TOKENIZER, PROMPT, params)
    pieces = list(stream)
    result = stream.result()
    assert "".join(piece.text for piece in pieces) == result.text
    assert [i for piece in pieces for i in piece.token_ids] == result.token_ids
    assert all(piece.text for piece in pieces[:-1])
    assert not any(text in result.text for text in stop)
    # Everything but the stop string and what its last token brought besides is there.
    assert TOKENIZER.decode(result.token_ids).startswith(result.text)
    if result.stop is None:
        assert result.text == TOKENIZER.decode(result.token_ids)
    else:
        assert TOKENIZER.decode(result.token_ids).startswith(result.text + result.stop)
    if logprobs is None:
        assert result.logprobs is None and all(piece.logprob is None for piece in pieces)
    else:
        assert [e.token_id for e in result.logprobs] == result.token_ids
        assert sum(piece.logprob for piece in pieces) == pytest.approx(sum(e.logprob for e in result.logprobs))


def test_log_probabilities_are_the_models() -> None:
    result = generate(DECODER, PROMPT, max_tokens=12, seed=3, logprobs=2, logit_bias=NO_END)
    with torch.inference_mode():
        logits = MODEL(torch.tensor([PROMPT + result.token_ids[:-1]]))[0, len(PROMPT) - 1 :]
    expected = torch.log_softmax(logits.double(), -1)
    for row, entry in zip(expected, result.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [value for _, value in entry.alternatives] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_what_is_not_text_is_never_generated() -> None:
    result = generate(DECODER, PROMPT, max_tokens=400, temperature=100.0, seed=0, logit_bias=NO_END)
    assert not set(result.token_ids) & (TOKENIZER.special_ids - {EOS})


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([1, 320], "320"), ([-2], "-2")])
def test_impossible_prompts_are_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(DECODER, prompt)


def test_timings_count_the_engine_and_not_the_reader() -> None:
    result = generate(DECODER, PROMPT, max_tokens=10, seed=1, logit_bias=NO_END)
    timings = result.timings
    assert timings.prefill_seconds > 0 and timings.decode_seconds > 0
    assert timings.tokens_per_second == pytest.approx(9 / timings.decode_seconds)
    assert generate(DECODER, PROMPT, max_tokens=1, seed=1).timings.tokens_per_second == 0


def test_stopping_in_the_middle_leaves_what_came() -> None:
    decoder = says(len(PROMPT), TOKENIZER.encode("story"))
    stream = Stream(decoder, TOKENIZER, PROMPT, SamplingParams(temperature=0))
    pieces = [next(stream), next(stream)]
    stream.close()
    assert stream.result().text == "st" == "".join(piece.text for piece in pieces)
    assert stream.result().finish_reason is None and stream.finished
    assert list(stream) == [] and decoder.sequences[0].closed


# -- seeds --------------------------------------------------------------------------------------------------


def test_a_seed_gives_its_text_whatever_else_runs() -> None:
    """Alone, interleaved with another stream, and in one batch with others, as a serving engine would."""
    settings = {"max_tokens": 25, "temperature": 1.2, "logit_bias": NO_END}
    prompts = [PROMPT, TOKENIZER.encode("a light", bos=True), TOKENIZER.encode("of", bos=True)]
    alone = [generate(DECODER, prompt, seed=i, **settings) for i, prompt in enumerate(prompts)]
    streams = [
        Stream(DECODER, TOKENIZER, p, SamplingParams(seed=i, **settings), context=64) for i, p in enumerate(prompts)
    ]
    while any([next(stream, None) for stream in streams]):
        pass
    batch = run_batch([SamplingParams(seed=i, **settings) for i in range(3)], prompts)
    for expected, stream, completion in zip(alone, streams, batch, strict=True):
        assert stream.result().token_ids == expected.token_ids == completion.token_ids
        assert stream.result().text == expected.text == completion.text


def run_batch(params: list[SamplingParams], prompts: list[list[int]]) -> list[Completion]:
    """All requests in one forward call per token."""
    rows = MODEL.config.vocab_size
    requests = [
        Completion(TOKENIZER, p, banned_ids(TOKENIZER, rows), rows, ids) for p, ids in zip(params, prompts, strict=True)
    ]
    sequences = [DECODER.new_sequence(64) for _ in requests]
    new = [list(ids) for ids in prompts]
    while any(request.finish_reason is None for request in requests):
        chunks = [Chunk(sequence, ids) for sequence, ids in zip(sequences, new, strict=True)]
        for request, logits in zip(requests, DECODER.forward(chunks), strict=True):
            request.accept(logits)
        new = [[request.token_ids[-1]] for request in requests]
    return requests


def test_the_reported_seed_repeats_the_text() -> None:
    first = generate(DECODER, PROMPT, max_tokens=20)
    assert generate(DECODER, PROMPT, max_tokens=20, seed=first.seed).token_ids == first.token_ids


# -- context overflow ---------------------------------------------------------------------------------------


def test_error_refuses_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(ContextLengthError, match="the prompt has 21 tokens and the context 20"):
        generate(DECODER, [EOS] + [5] * 20, context=20)


@pytest.mark.parametrize("length", [1, 10, 19, 20])
def test_error_uses_the_context_to_its_last_position(length: int) -> None:
    result = generate(DECODER, [5] * length, context=20, max_tokens=100, seed=0, logit_bias=NO_END)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 20 - length + 1


def test_a_context_larger_than_the_models_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="16384"):
        generate(DECODER, [5], context=16_385)


def test_truncate_left_makes_room_for_the_answer() -> None:
    params = SamplingParams(max_tokens=6, context_overflow="truncate-left")
    long = [EOS, *range(2, 40)]
    assert fit_prompt(long, 20, params, EOS) == [EOS, *range(26, 40)]  # 15 + 6 - 1 = 20
    assert fit_prompt(long[1:], 20, params, EOS) == list(range(25, 40))
    assert fit_prompt(long[:15], 20, params, EOS) == long[:15]
    # A large max_tokens takes at most half of the context away from the prompt.
    assert len(fit_prompt(long, 20, params.replace(max_tokens=500), EOS)) == 10
    short = generate(DECODER, [EOS, *range(26, 40)], context=20, max_tokens=6, seed=4, logit_bias=NO_END)
    cut = generate(DECODER, long, context=20, max_tokens=6, seed=4, logit_bias=NO_END, context_overflow="truncate-left")
    assert cut.token_ids == short.token_ids and len(cut.token_ids) == 6
    assert cut.usage.prompt_tokens == 15


@pytest.mark.parametrize(("context", "length"), [(12, 4), (12, 12), (12, 30), (7, 3), (2, 1), (1, 1)])
def test_shift_equals_reading_the_newest_half_again(context: int, length: int) -> None:
    prompt = [EOS, *range(30, 30 + length - 1)]
    window = newest(prompt, (context + 1) // 2, EOS) if length > context else list(prompt)
    expected: list[int] = []
    banned = banned_ids(TOKENIZER, MODEL.config.vocab_size)
    for _ in range(40):
        if len(window) > context:
            window = newest(window, (context + 1) // 2, EOS)
        with torch.inference_mode():
            scores = MODEL(torch.tensor([window]))[0, -1].numpy().copy()
        scores[banned] = -np.inf
        scores[EOS] -= 100
        expected.append(int(scores.argmax()))
        window.append(expected[-1])
    result = generate(
        DECODER, prompt, context=context, max_tokens=40, temperature=0, logit_bias=NO_END, context_overflow="shift"
    )
    assert result.token_ids == expected and result.finish_reason == "length"


def test_newest_keeps_begin_of_text() -> None:
    assert newest([EOS, 5, 6, 7], 2, EOS) == [EOS, 7]
    assert newest([5, 6, 7], 2, EOS) == [6, 7]
    assert newest([EOS, 5], 1, EOS) == [5]


@pytest.mark.slow
def test_a_prompt_of_the_whole_context_gets_its_token() -> None:
    prompt = np.random.default_rng(0).integers(2, 300, MODEL.config.max_positions).tolist()
    result = generate(DECODER, prompt, temperature=0, max_tokens=5, logit_bias=NO_END)
    assert (len(result.token_ids), result.finish_reason) == (1, "length")


# -- sessions -----------------------------------------------------------------------------------------------


def test_a_session_reads_only_what_is_new() -> None:
    decoder = ScriptedDecoder(lambda ids: 40)
    session = Session(decoder, 100)
    first = generate(decoder, [EOS, 10, 11, 12], session=session, max_tokens=3, temperature=0)
    assert decoder.calls == [4, 1, 1] and first.usage.cached_tokens == 0
    decoder.calls.clear()
    turn = [EOS, 10, 11, 12, *first.token_ids, 13, 14]
    second = generate(decoder, turn, session=session, max_tokens=1, temperature=0)
    assert decoder.calls == [3] and second.usage.cached_tokens == 6  # the last token of an answer is never stored
    decoder.calls.clear()
    assert generate(decoder, turn, session=session, max_tokens=1, temperature=0).usage.cached_tokens == len(turn) - 1
    assert generate(decoder, [5, 6], session=session, max_tokens=1).usage.cached_tokens == 0
    assert decoder.calls == [1, 2] and not decoder.sequences[0].closed
    session.close()
    assert decoder.sequences[0].closed


@settings(max_examples=25)
@given(turns=st.lists(st.lists(st.sampled_from([20, 30, 40]), min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_session_changes_no_result(turns: list[list[int]]) -> None:
    session = Session(DECODER, 64)
    for turn in turns:
        fresh = generate(DECODER, turn, context=64, max_tokens=4, temperature=0)
        reused = generate(DECODER, turn, session=session, max_tokens=4, temperature=0)
        assert reused.token_ids == fresh.token_ids


def test_a_session_survives_an_interruption() -> None:
    """Ctrl-C inside the decoder, before or after it stored the tokens."""
    for stored in (False, True):
        session = Session(Interrupting(at=3, stored=stored), 64)
        with pytest.raises(KeyboardInterrupt):
            generate(session._decoder, PROMPT, session=session, max_tokens=20, temperature=0, logit_bias=NO_END)
        again = generate(session._decoder, PROMPT, session=session, max_tokens=8, temperature=0, logit_bias=NO_END)
        assert again.token_ids == generate(DECODER, PROMPT, max_tokens=8, temperature=0, logit_bias=NO_END).token_ids


class Interrupting(ReferenceDecoder):
    """Raises KeyboardInterrupt in one of its calls."""

    def __init__(self, *, at: int, stored: bool) -> None:
        super().__init__(MODEL)
        self._calls, self._at, self._stored = 0, at, stored

    def forward(self, chunks: list[Chunk], *, exact_top: int | None = None) -> list[np.ndarray | None]:
        self._calls += 1
        if self._calls == self._at and not self._stored:
            raise KeyboardInterrupt
        results = super().forward(chunks, exact_top=exact_top)
        if self._calls == self._at:
            raise KeyboardInterrupt
        return results


def test_a_long_prompt_is_read_in_parts_with_progress() -> None:
    reports: list[tuple[int, int]] = []
    decoder = says(1200, [EOS])
    stream = Stream(
        decoder, TOKENIZER, [5] * 1200, SamplingParams(), progress=lambda done, total: reports.append((done, total))
    )
    list(stream)
    assert decoder.calls == [PREFILL_CHUNK, PREFILL_CHUNK, 1200 - 2 * PREFILL_CHUNK]
    assert reports == [(512, 1200), (1024, 1200), (1200, 1200)]


def test_a_piece_knows_its_probability() -> None:
    result = generate(DECODER, PROMPT, max_tokens=3, logprobs=0, seed=0, logit_bias=NO_END)
    piece = Piece("x", tuple(result.token_ids), tuple(result.logprobs))
    assert piece.logprob == pytest.approx(math.fsum(entry.logprob for entry in result.logprobs))


# -- greedy tokens in bursts --------------------------------------------------------------------------------


@pytest.fixture
def bursts_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make streams ask for so many tokens at once, but for what room and max_tokens allow."""
    return lambda size: monkeypatch.setattr(
        "persimmon.infer.generate.steps_ahead", lambda seconds, most: min(size, most)
    )


def mixed(ids: list[int]) -> int:
    """A text without end that depends on all before it."""
    return 20 + (sum(ids) * 7 + len(ids)) % 60


GREEDY: list[dict[str, object]] = [
    {"max_tokens": 1},
    {"max_tokens": 30},
    {"max_tokens": 30, "stop": ("t",)},
    {"max_tokens": 200, "context_overflow": "shift"},
    {"max_tokens": 200},
]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("sampling", GREEDY)
def test_bursts_change_no_result(size: int, sampling: dict[str, object], bursts_of: Callable[[int], None]) -> None:
    bursts_of(size)
    expected = generate(ScriptedDecoder(mixed), PROMPT, context=50, temperature=0, **sampling)
    decoder = ScriptedGreedyDecoder(mixed)
    result = generate(decoder, PROMPT, context=50, temperature=0, **sampling)
    assert (result.token_ids, result.text, result.finish_reason) == (
        expected.token_ids, expected.text, expected.finish_reason,
    )  # fmt: skip
    assert all(1 <= burst <= size for burst in decoder.bursts)
    assert bool(decoder.bursts) == (len(result.token_ids) > 1)
    if sampling == {"max_tokens": 30}:
        whole, rest = divmod(29, size)
        assert decoder.calls == [len(PROMPT)] and decoder.bursts == [size] * whole + [rest] * (rest > 0)


@pytest.mark.parametrize("stored", [False, True])
def test_a_burst_can_be_interrupted(stored: bool, bursts_of: Callable[[int], None]) -> None:
    """Ctrl-C in the third burst, before or after its tokens were stored."""
    bursts_of(5)

    class InterruptedOnce(ScriptedGreedyDecoder):
        def greedy(self, *args: Any) -> list[int]:
            if len(self.bursts) == 2 and not stored:
                self.bursts.append(0)
                raise KeyboardInterrupt
            picked = super().greedy(*args)
            if len(self.bursts) == 3 and stored:
                raise KeyboardInterrupt
            return picked

    decoder = InterruptedOnce(mixed)
    session = Session(decoder, 100)
    with pytest.raises(KeyboardInterrupt):
        generate(decoder, PROMPT, session=session, temperature=0, max_tokens=40)
    again = generate(decoder, PROMPT, session=session, temperature=0, max_tokens=40)
    fresh = generate(ScriptedDecoder(mixed), PROMPT, context=100, temperature=0, max_tokens=40)
    assert again.token_ids == fresh.token_ids


def test_bursts_never_pick_what_is_no_text(bursts_of: Callable[[int], None]) -> None:
    bursts_of(4)
    seen: list[np.ndarray] = []

    class Noting(ScriptedGreedyDecoder):
        def greedy(
            self, sequence: CachedSequence, token_id: int, count: int, banned: np.ndarray, stop_id: int
        ) -> list[int]:
            seen.append(banned)
            return super().greedy(sequence, token_id, count, banned, stop_id)

    generate(Noting(mixed), PROMPT, context=60, temperature=0, max_tokens=9)
    assert len(seen) == 2 and all(np.array_equal(b, banned_ids(TOKENIZER, MODEL.config.vocab_size)) for b in seen)


def test_a_burst_ends_with_the_text(bursts_of: Callable[[int], None]) -> None:
    bursts_of(64)
    ids = [*TOKENIZER.encode("story"), EOS]
    decoder = ScriptedGreedyDecoder(lambda stored: ids[len(stored) - len(PROMPT)])
    result = generate(decoder, PROMPT, context=100, temperature=0, max_tokens=50)
    assert (result.text, result.finish_reason) == ("story", "stop")
    assert decoder.calls == [len(PROMPT)] and decoder.bursts == [len(ids) - 1]


def test_what_a_burst_stored_too_much_is_forgotten(bursts_of: Callable[[int], None]) -> None:
    """A stop string ends the answer in the middle of a burst; the next turn of the session is as if it had not been."""
    bursts_of(16)
    decoder = ScriptedGreedyDecoder(mixed)
    session = Session(decoder, 100)
    free = generate(ScriptedDecoder(mixed), PROMPT, context=100, temperature=0, max_tokens=12)
    stop = TOKENIZER.decode(free.token_ids[3:4])
    first = generate(decoder, PROMPT, session=session, temperature=0, max_tokens=60, stop=(stop,))
    assert len(first.token_ids) < 12 and decoder.sequences[0].length > len(PROMPT) + len(first.token_ids)
    assert session.token_ids == [*PROMPT, *first.token_ids[:-1]]
    turn = [*PROMPT, *first.token_ids, 30, 31]
    second = generate(decoder, turn, session=session, temperature=0, max_tokens=8)
    assert (
        second.token_ids == generate(ScriptedDecoder(mixed), turn, context=100, temperature=0, max_tokens=8).token_ids
    )
    assert second.usage.cached_tokens == len(PROMPT) + len(first.token_ids) - 1


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"logprobs": 2}, {"logit_bias": {25: 5.0}}, {"presence_penalty": 1.0}]
)
def test_only_plain_greedy_tokens_come_in_bursts(sampling: dict[str, object]) -> None:
    decoder = ScriptedGreedyDecoder(mixed)
    generate(decoder, PROMPT, context=60, max_tokens=20, **{"temperature": 0, **sampling})
    assert not decoder.bursts


def test_bursts_are_as_long_as_they_are_short_in_time() -> None:
    assert steps_ahead(0.0, 10) == 1  # nothing is known yet
    assert steps_ahead(0.1, 10) == 1 and steps_ahead(1e-9, 10) == 10
    assert steps_ahead(0.002, 100) == 10 and steps_ahead(1e-9, 1000) == MOST_AHEAD
