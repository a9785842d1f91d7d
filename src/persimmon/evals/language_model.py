"""What an evaluation asks of a model, answered by any Decoder.

The work is arranged in lanes. A lane owns one cached sequence and goes through a run of token sequences that were
sorted, so that neighbours share a beginning: it drops what differs and feeds only the rest. The choices of one
question, the examples of one subject and the samples of one prompt are thereby read once. All lanes advance in the
same call of the decoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from persimmon.errors import InputError
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Request, Response, Score, TokenLikelihoods
from persimmon.infer.decoder import CachedSequence, Chunk, Decoder, Logits, Scored, ScoringDecoder
from persimmon.tokenizer import Tokenizer, split_continuation

MEASURE_CHUNK = 512
"""Tokens of a long text whose logits are held at once (512 MiB of float32 for the 8B's vocabulary)."""


class LanguageModel(Protocol):
    """A model under test."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the results depend on: model, engine, precision, opening token. Recorded with every score."""

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""

    @property
    def truncated(self) -> int:
        """Requests so far that did not fit and lost their beginning."""

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without an opening token."""

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request, in order. Equal requests get equal answers."""


class DecoderLanguageModel:
    """A Decoder and its tokenizer as a LanguageModel."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        bos: bool = True,
        lanes: int | None = None,
        cache_tokens: int = 65_536,
        seed: int = 0,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up.

        Args:
            decoder: the engine.
            tokenizer: its vocabulary.
            context: longest sequence in tokens; None is the model's.
            bos: open every sequence with the end-of-text token, as the hub's tokenizer does.
            lanes: most sequences that run side by side; None is 64, or 16 where the decoder hands out logits for all.
            cache_tokens: most tokens of keys and values kept by all lanes together.
            seed: of sampled completions.
            identity: what else to record, for instance the model's name.
        """
        if lanes is None:
            lanes = 64 if isinstance(decoder, ScoringDecoder) else 16
        if lanes < 1 or cache_tokens < 1:
            raise InputError(f"lanes and cache_tokens must be at least 1, got {lanes} and {cache_tokens}")
        self._decoder, self._tokenizer = decoder, tokenizer
        self._bos, self._lanes, self._cache_tokens, self._seed = bos, lanes, cache_tokens, seed
        self.context = context or decoder.config.max_positions
        self._identity = {**(identity or {}), "engine": decoder.name, "bos": bos, "seed": seed}
        self.truncated = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """See LanguageModel."""
        return self._identity

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary."""
        return self._tokenizer

    @property
    def decoder(self) -> Decoder:
        """The engine."""
        return self._decoder

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self._tokenizer.encode(text))

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request; scores, generations and measurements each run together."""
        responses: dict[int, Response] = {}
        scores = {i: r for i, r in enumerate(requests) if isinstance(r, Score)}
        texts = {i: r for i, r in enumerate(requests) if isinstance(r, Generate)}
        if scores:
            pairs = [self._encode(request) for request in scores.values()]
            responses.update(zip(scores, self.score_ids(pairs), strict=True))
        if texts:
            responses.update(zip(texts, self._generate(list(texts.values())), strict=True))
        for index, request in enumerate(requests):
            if isinstance(request, Measure):
                responses[index] = self._measure(request.text)
        return [responses[index] for index in range(len(requests))]

    # -- likelihood ----------------------------------------------------------------------------------

    def _encode(self, request: Score) -> tuple[list[int], list[int]]:
        context, continuation = split_continuation(self._tokenizer, request.context, request.continuation)
        # Without an opening token an empty context still needs something to predict from.
        opening = [self._tokenizer.bos_id] if self._bos or not context else []
        return opening + context, continuation

    def score_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Likelihood of each continuation after its non-empty context, both in token ids."""
        jobs: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, pair in enumerate(pairs):
            context, continuation = self._fit(*pair)
            jobs.setdefault(context, {}).setdefault(continuation, []).append(index)
        results: dict[int, Likelihood] = {}
        room = {context: max(map(len, continuations)) for context, continuations in jobs.items()}
        lanes = self._open_lanes(list(jobs), lambda context: len(context) + room[context] - 1)
        for turn in _turns(lanes):
            self._feed([(lane, context[:-1], "none") for lane, context in turn])
            waiting = {lane: list(jobs[context].items()) for lane, context in turn}
            while ready := [(lane, context, waiting[lane].pop()) for lane, context in turn if waiting[lane]]:
                scored = self._score([(lane, context, continuation) for lane, context, (continuation, _) in ready])
                for (lane, context, (_, indices)), found in zip(ready, scored, strict=True):
                    results |= dict.fromkeys(indices, found)
                    lane.truncate(len(context) - 1)
        _close(lanes)
        return [results[index] for index in range(len(pairs))]

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Drop the beginning of what does not fit; the last token is only predicted and needs no position."""
        excess = len(context) + len(continuation) - 1 - self.context
        if excess > 0:
            self.truncated += 1
            if excess >= len(context):
                raise InputError(f"a continuation of {len(continuation)} tokens leaves no room in {self.context}")
            context = context[excess:]
        return tuple(context), tuple(continuation)

    # -- whole texts ---------------------------------------------------------------------------------

    def _measure(self, text: str) -> TokenLikelihoods:
        ids = [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        if len(ids) > self.context + 1:
            self.truncated += 1
            ids = ids[: self.context + 1]
        num_bytes = sum(len(self._tokenizer.piece_bytes(token)) for token in ids[1:])
        return TokenLikelihoods(self.token_log_probabilities(ids), num_bytes)

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of every id but the first, given all before it."""
        if len(ids) < 2:
            return []
        sequence = self._decoder.new_sequence(len(ids) - 1)
        found: list[float] = []
        for start in range(0, len(ids) - 1, MEASURE_CHUNK):
            part = ids[start : min(start + MEASURE_CHUNK, len(ids) - 1)]
            (scored,) = score(self._decoder, [Chunk(sequence, part, "all")], [ids[start + 1 : start + 1 + len(part)]])
            found += scored.log_probabilities.tolist()
        sequence.close()
        return found

    # -- generation ----------------------------------------------------------------------------------

    def _generate(self, requests: Sequence[Generate]) -> list[list[str]]:
        """Continue every prompt; a lane takes its next prompt as soon as one is finished."""
        prompts = [self._prompt(request) for request in requests]
        writings = [
            _Writing(prompts[index], request, index, copy)
            for index, request in enumerate(requests)
            for copy in range(request.count)
        ]
        by_prompt: dict[tuple[int, ...], list[_Writing]] = {}
        for writing in writings:
            by_prompt.setdefault(writing.prompt, []).append(writing)
        room = {prompt: max(w.request.max_tokens for w in same) for prompt, same in by_prompt.items()}
        lanes = self._open_lanes(list(by_prompt), lambda prompt: min(self.context, len(prompt) + room[prompt]))
        waiting = {lane: [w for prompt in lane.run for w in by_prompt[prompt]][::-1] for lane in lanes}
        current = {lane: waiting[lane].pop() for lane in lanes}
        while current:
            exact_top = 1 if all(writing.request.temperature == 0 for writing in current.values()) else None
            logits = self._feed([(lane, writing.ids, "last") for lane, writing in current.items()], exact_top)
            for lane, row in zip(list(current), logits, strict=True):
                assert row is not None
                writing = current[lane]
                self._write(writing, row)
                if writing.done and waiting[lane]:
                    current[lane] = waiting[lane].pop()
                elif writing.done:
                    del current[lane]
        _close(lanes)
        texts: list[list[str]] = [[] for _ in requests]
        for writing in writings:
            texts[writing.index].append(writing.text)
        return texts

    def _prompt(self, request: Generate) -> tuple[int, ...]:
        ids = self._tokenizer.encode(request.context, bos=self._bos)
        room = self.context - request.max_tokens
        if room < 1:
            raise InputError(f"max_tokens {request.max_tokens} leaves no room for a prompt in {self.context} positions")
        if len(ids) > room:
            self.truncated += 1
            ids = ids[len(ids) - room :]
        return tuple(ids) or (self._tokenizer.bos_id,)

    def _write(self, writing: _Writing, logits: Logits) -> None:
        """Append one token, or finish."""
        token = self._choose(writing, logits)
        if token == self._tokenizer.eos_id:
            writing.done = True
            return
        writing.ids.append(token)
        writing.bytes += self._tokenizer.piece_bytes(token)
        text = writing.bytes.decode(errors="replace")
        ends = [text.find(stop) for stop in writing.request.stop]
        end = min((place for place in ends if place >= 0), default=None)
        writing.text = text[:end]
        writing.done = end is not None or len(writing.ids) - len(writing.prompt) >= writing.request.max_tokens

    def _choose(self, writing: _Writing, logits: Logits) -> int:
        """The likeliest token, or a sample that depends only on the seed, the prompt, the copy and the place."""
        masked = logits[: self._tokenizer.vocab_size]
        if writing.request.temperature == 0:
            return int(masked.argmax())
        place = len(writing.ids) - len(writing.prompt)
        crc = zlib.crc32(np.asarray(writing.prompt, dtype=np.int64).tobytes())
        noise = np.random.default_rng((self._seed, crc, writing.copy, place)).gumbel(size=len(masked))
        return int((masked.astype(np.float64) / writing.request.temperature + noise).argmax())

    # -- lanes ---------------------------------------------------------------------------------------

    def _open_lanes(self, runs: list[tuple[int, ...]], size: Callable[[tuple[int, ...]], int]) -> list[_Lane]:
        """Sort the token sequences and deal them to lanes in runs of neighbours."""
        runs.sort()
        capacity = max(map(size, runs))
        count = max(1, min(self._lanes, len(runs), self._cache_tokens // capacity))
        edges = [len(runs) * lane // count for lane in range(count + 1)]
        return [_Lane(self._decoder.new_sequence(capacity), runs[start:end]) for start, end in pairwise(edges)]

    def _feed(
        self,
        wanted: Sequence[tuple[_Lane, Sequence[int], Literal["none", "last", "all"]]],
        exact_top: int | None = None,
    ) -> list[Logits | None]:
        """Bring each lane to hold exactly the given ids, feeding only what it does not hold already.

        Logits are those of the tokens fed; for "last" at least the last token is fed again.
        """
        chunks = []
        for lane, ids, logits in wanted:
            keep = _shared(lane.held, ids)
            lane.truncate(keep if logits == "none" else min(keep, len(ids) - 1))
            new = ids[len(lane.held) :]
            if new:
                chunks.append(Chunk(lane.sequence, list(new), logits))
                lane.held.extend(new)
        return self._decoder.forward(chunks, exact_top=exact_top) if chunks else []

    def _score(self, wanted: Sequence[tuple[_Lane, Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Likelihoods of (lane, context, continuation); every lane holds its context but for the last token."""
        chunks = []
        for lane, context, continuation in wanted:
            new = [context[-1], *continuation[:-1]]
            chunks.append(Chunk(lane.sequence, new, "all"))
            lane.held.extend(new)
        scored = score(self._decoder, chunks, [continuation for _, _, continuation in wanted])
        return [likelihood(found, continuation) for found, (_, _, continuation) in zip(scored, wanted, strict=True)]


@dataclass(eq=False)
class _Lane:
    """One cached sequence and the token sequences it goes through."""

    sequence: CachedSequence
    run: list[tuple[int, ...]]
    held: list[int] = field(default_factory=list)

    def truncate(self, length: int) -> None:
        if length < len(self.held):
            self.sequence.truncate(length)
            del self.held[length:]


@dataclass
class _Writing:
    """One text in the making."""

    prompt: tuple[int, ...]
    request: Generate
    index: int
    copy: int
    ids: list[int] = field(init=False)
    bytes: bytes = b""
    text: str = ""
    done: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)


def _turns(lanes: Sequence[_Lane]) -> Iterator[list[tuple[_Lane, tuple[int, ...]]]]:
    """The n-th token sequence of every lane that has one, for n = 0, 1, .."""
    for turn in range(max(len(lane.run) for lane in lanes)):
        yield [(lane, lane.run[turn]) for lane in lanes if turn < len(lane.run)]


def _close(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        lane.sequence.close()


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def score(decoder: Decoder, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> list[Scored]:
    """Run chunks, a target for each of their tokens: by the decoder itself where it can, else from its logits."""
    if isinstance(decoder, ScoringDecoder):
        return decoder.score(chunks, targets)
    return [
        scored_logits(rows, wanted)
        for rows, wanted in zip(decoder.forward(chunks), targets, strict=True)
        if rows is not None
    ]


def scored_logits(logits: Logits, tokens: Sequence[int]) -> Scored:
    """Log-softmax of logits [T, V] at tokens [T], summed in float64."""
    rows = logits.astype(np.float64)
    top = rows.max(axis=1)
    normalizer = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    picked: NDArray[np.float64] = rows[np.arange(len(tokens)), np.asarray(tokens)]
    return Scored(picked - normalizer, logits.argmax(axis=1).astype(np.int32))


def likelihood(scored: Scored, tokens: Sequence[int]) -> Likelihood:
    """Likelihood of tokens [T] together."""
    total = float(scored.log_probabilities.sum())
    return Likelihood(total, bool((scored.likeliest == np.asarray(tokens)).all()), len(tokens))
