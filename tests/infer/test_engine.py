"""Continuous batching over the tiny model: same answers alone and in a crowd, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import pytest

from cpu_decoders import cpu_decoder
from persimmon.errors import ContextLengthError, InputError
from persimmon.infer.block_cache import PagedReference
from persimmon.infer.completion import Piece
from persimmon.infer.constraint import Grammar, choice, json_schema
from persimmon.infer.decoder import Decoder
from persimmon.infer.engine import ACTIVE_STEPS, Engine, Request, Update, num_blocks_for
from persimmon.infer.generate import Stream
from persimmon.infer.paged import PagedChunk, SeparateCaches, page
from persimmon.infer.params import SamplingParams
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(max_positions=256)


MakeEngine = Callable[..., Engine]

DECODERS: dict[str, Callable[[], Decoder]] = {
    "reference": lambda: ReferenceDecoder(MODEL),
    "cpu": lambda: cpu_decoder(MODEL),
    "cpu, int8 keys and values": lambda: cpu_decoder(MODEL, kv_dtype="int8", threads=2),
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return DECODERS[request.param]()


@pytest.fixture
def engine(decoder: Decoder) -> MakeEngine:
    """A fresh engine over blocks of its own."""

    def make(num_blocks: int = 64, **settings: int) -> Engine:
        return Engine(page(decoder, num_blocks, 16, max_sequences=16), TOKENIZER, **settings)

    return make


def request(name: str, text: str = "the story of light", **changes: object) -> Request:
    sampling = {"max_tokens": 12, "temperature": 0.8, "seed": 7, "logprobs": 2}
    fields = {
        k: changes.pop(k)
        for k in ("skip_space", "prompt_logprobs", "grammar", "replayed", "replayed_logprobs")
        if k in changes
    }
    ids = changes.pop("prompt_ids", None) or TOKENIZER.encode(text, bos=True)
    return Request(name, tuple(ids), SamplingParams(**{**sampling, **changes}), **fields)


class Answer:
    """The updates of one request, put together."""

    def __init__(self, updates: Sequence[Update]) -> None:
        pieces = [u.piece for u in updates if u.piece is not None]
        self.text = "".join(p.text for p in pieces)
        self.token_ids = [i for p in pieces for i in p.token_ids]
        self.logprobs = [entry for p in pieces for entry in p.logprobs]
        self.last = updates[-1]


def answers(engine: Engine, requests: Sequence[Request]) -> dict[str, Answer]:
    for one in requests:
        engine.submit(one)
    return drain(engine)


def drain(engine: Engine) -> dict[str, Answer]:
    found: dict[str, list[Update]] = {}
    while engine.busy:
        for update in engine.step():
            found.setdefault(update.request_id, []).append(update)
    assert engine.state.blocks_held == 0
    return {name: Answer(updates) for name, updates in found.items()}


def crowd(count: int, seed: int = 0) -> list[Request]:
    dice = random.Random(seed)
    letters = "abcdefgh the story of light \n"
    return [
        request(
            f"r{n}", "".join(dice.choices(letters, k=dice.randint(1, 60))), seed=n, max_tokens=dice.randint(1, 30),
            temperature=dice.choice([0.0, 1.0]), top_p=dice.choice([0.7, 1.0]),
            presence_penalty=dice.choice([0.0, 0.5]),
        )
        for n in range(count)
    ]  # fmt: skip


def test_an_answer_is_the_streams(engine: MakeEngine, decoder: Decoder) -> None:
    one = request("a", temperature=0.0, logprobs=None)
    stream = Stream(decoder, TOKENIZER, one.prompt_ids, one.params)
    text = "".join(piece.text for piece in stream)
    got = answers(engine(), [one])["a"]
    assert got.text == text and got.token_ids == stream.result().token_ids
    assert got.last.finish_reason == stream.result().finish_reason
    assert got.last.usage is not None and got.last.usage.prompt_tokens == len(one.prompt_ids)


@pytest.mark.parametrize("blocks", [64, 9], ids=["roomy", "crowded"])
def test_same_request_same_answer_alone_or_in_a_crowd(engine: MakeEngine, blocks: int) -> None:
    requests = crowd(10)
    together = engine(blocks, max_running=6, step_tokens=24)
    got = answers(together, requests)
    if blocks == 9:
        assert together.state.preemptions > 0, "the small cache must send some back"
    for one in requests:
        single = answers(engine(), [one])[one.id]
        assert got[one.id].token_ids == single.token_ids
        assert got[one.id].logprobs == single.logprobs, "to the last bit"
        assert got[one.id].text == single.text


def test_requests_go_on_elsewhere_where_they_were(engine: MakeEngine) -> None:
    one = request("a", max_tokens=20, logit_bias={1: -100.0})
    whole = answers(engine(), [one])["a"]
    first = engine()
    first.submit(one)
    pieces: list[Piece] = []
    while len(pieces) < 6 and first.busy:
        pieces += [u.piece for u in first.step() if u.piece is not None]
    known = tuple(i for p in pieces for i in p.token_ids)
    scores = tuple(entry for p in pieces for entry in p.logprobs)
    again = request("a", max_tokens=20, logit_bias={1: -100.0}, replayed=known, replayed_logprobs=scores)
    rest = answers(engine(), [again])["a"]
    assert [*known, *rest.token_ids] == whole.token_ids
    assert "".join(p.text for p in pieces) + rest.text == whole.text
    assert [x for p in pieces for x in p.logprobs] + rest.logprobs == whole.logprobs


def test_cancelling_frees_everything_at_once(engine: MakeEngine) -> None:
    busy = engine()
    for one in crowd(4):
        busy.submit(one)
    busy.step()
    assert busy.state.blocks_held > 0
    for one in crowd(4):
        busy.cancel(one.id)
    assert busy.state.blocks_held == 0 and not busy.busy
    busy.cancel("unknown")


def test_the_next_turn_reads_only_what_is_new(engine: MakeEngine) -> None:
    served = engine()
    first = request("a", max_tokens=10, temperature=0.0)
    answer = answers(served, [first])["a"].token_ids
    before = served.state.tokens_computed
    stored = [*first.prompt_ids, *answer][:-1]
    prompt = [*stored, *TOKENIZER.encode(" human: of light")]
    got = answers(served, [request("b", prompt_ids=prompt, max_tokens=1)])["b"]
    assert served.state.tokens_computed - before == len(prompt) - len(stored)
    assert got.last.usage is not None and got.last.usage.cached_tokens == len(stored)


def test_prompt_logprobs_are_complete_whatever_the_cuts(engine: MakeEngine) -> None:
    text = "the story of light and a human story"
    whole = answers(engine(), [request("a", text, prompt_logprobs=1, max_tokens=1)])["a"].last
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None
    ids = TOKENIZER.encode(text, bos=True)
    assert [entry.token_id for entry in whole.prompt_logprobs if entry] == ids[1:]
    small = engine(step_tokens=5, max_running=2)
    cut = answers(small, [request("a", text, prompt_logprobs=1, max_tokens=1), *crowd(2)])["a"].last
    assert cut.prompt_logprobs == whole.prompt_logprobs


def test_the_context_ends_an_answer(engine: MakeEngine) -> None:
    small = engine(context=24)
    got = answers(small, [request("a", max_tokens=100, logit_bias={1: -100.0})])["a"]
    prompt = len(TOKENIZER.encode("the story of light", bos=True))
    assert got.last.finish_reason == "length" and len(got.token_ids) == 24 - prompt + 1
    with pytest.raises(ContextLengthError, match="context 24"):
        small.submit(request("b", prompt_ids=[1] * 25))
    with pytest.raises(ContextLengthError, match="the cache holds 32"):
        engine(2).submit(request("c", max_tokens=60))


def test_wrong_requests_are_refused_and_leave_nothing(engine: MakeEngine) -> None:
    served = engine()
    with pytest.raises(InputError, match="no tokens"):
        served.submit(Request("a", (), SamplingParams()))
    with pytest.raises(InputError, match="outside the vocabulary"):
        served.submit(request("a", prompt_ids=[5000]))
    served.submit(request("a"))
    with pytest.raises(InputError, match="is running"):
        served.submit(request("a"))


def reference_engine() -> Engine:
    return Engine(PagedReference(MODEL, 64, 16), TOKENIZER)


class Fragile(PagedReference):
    """Breaks whenever a certain token is run."""

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list:
        if any(300 in chunk.token_ids for chunk in chunks):
            raise RuntimeError("broken")
        return super().forward(chunks, exact_top=exact_top)


def test_a_request_that_breaks_the_decoder_ends_alone() -> None:
    fragile = Engine(Fragile(MODEL, 64, 16), TOKENIZER)
    requests = crowd(4)
    got = answers(fragile, [*requests, request("bad", prompt_ids=[1, 300, 2])])
    assert got["bad"].last.failure is not None and got["bad"].last.failure.kind == "engine"
    for one in requests:
        assert got[one.id].token_ids == answers(reference_engine(), [one])[one.id].token_ids


class Counting(PagedReference):
    """Counts how often it is asked for the shares."""

    looks = 0

    @property
    def active_fraction(self) -> list[float]:
        self.looks += 1
        return super().active_fraction


def test_active_values_are_looked_at_now_and_then() -> None:
    decoder = Counting(MODEL, 64, 16)
    engine = Engine(decoder, TOKENIZER)
    engine.submit(request("a", max_tokens=100, logit_bias={TOKENIZER.eos_id: -100}))
    steps, states = 0, [engine.state]
    while engine.busy:
        engine.step()
        steps += 1
        states.append(engine.state)
    assert steps >= 100 and 2 <= decoder.looks <= 3 + steps // ACTIVE_STEPS
    assert states[0].active_fraction == () and states[-1].active_fraction == tuple(decoder.active_fraction)


def test_any_decoder_can_be_served() -> None:
    plain = SeparateCaches(ReferenceDecoder(MODEL), 64, 16, max_sequences=3)
    requests = crowd(6)
    got = answers(Engine(plain, TOKENIZER, max_running=3, step_tokens=20), requests)
    assert all(got[one.id].last.finish_reason for one in requests)
    greedy = request("g", temperature=0.0, logprobs=None)
    assert (
        answers(Engine(plain, TOKENIZER, max_running=3), [greedy])["g"].text
        == answers(reference_engine(), [greedy])["g"].text
    )


def test_page_takes_the_decoders_own_block_cache() -> None:
    assert isinstance(page(ReferenceDecoder(MODEL), 8, 16, max_sequences=2), PagedReference)


GRAMMARS: dict[str, tuple[Grammar, Callable[[str], object]]] = {
    "choice": (choice(["light", "a story"]), ["light", "a story"].index),
    "regex": (Grammar("regex", "[a-c]{3,5}:"), lambda text: None if 4 <= len(text) <= 6 and text[-1] == ":" else 1 / 0),
    "schema": (
        json_schema({"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
                     "additionalProperties": False}),
        lambda text: {"x": 1, "y": 2}[json.loads(text)["a"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAMMARS)
def test_answers_match_their_grammar(engine: MakeEngine, kind: str) -> None:
    pytest.importorskip("llguidance")
    grammar, check = GRAMMARS[kind]
    requests = [request(f"r{n}", seed=n, max_tokens=60, grammar=grammar) for n in range(4)]
    for answer in answers(engine(), [*requests, *crowd(2)[:0]]).values():
        assert answer.last.finish_reason == "stop"
        check(answer.text)


def test_wrong_grammars_are_input_errors(engine: MakeEngine) -> None:
    pytest.importorskip("llguidance")
    for grammar in (Grammar("regex", "(a"), Grammar("regex", "(?<=a)b"), Grammar("json_schema", '{"type": "nothing"}')):
        with pytest.raises(InputError, match=grammar.kind):
            engine().submit(request("a", grammar=grammar))
    with pytest.raises(InputError, match="limit is 65536"):
        Grammar("regex", "a" * 70_000)


def test_the_cache_holds_what_fits() -> None:
    assert num_blocks_for(1000, 4, token_bytes=10, budget=10**9, block_size=16) == 63 * 4
    assert num_blocks_for(1000, 4, token_bytes=10, budget=100 * 160, block_size=16) == 100
    assert num_blocks_for(1000, 4, token_bytes=10, budget=0, block_size=16) == 63
