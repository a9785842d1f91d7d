"""Continuous batching: many requests over one decoder, one step at a time.

A step asks the scheduler what to run, runs it in one call of the decoder, and lets every request pick its next
token. Each request has its own sampler, seeded and counter-based, and on the reference engine its logits are the same
to the last bit whatever else runs (infer/block_cache.py): the same request gets the same answer, alone or in a crowd,
and also when it is taken up again elsewhere with the tokens it already had (`Request.replayed`).

A request that makes the decoder fail ends with an error; the others of the step go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from persimmon.errors import ContextLengthError, InputError, PersimmonError
from persimmon.infer.blocks import BlockAllocator
from persimmon.infer.completion import Completion, Piece, Usage
from persimmon.infer.constraint import Constraint, Grammar, GrammarCompiler
from persimmon.infer.decoder import Logits
from persimmon.infer.drawing import Draw, DrawingDecoder, Picked, can_draw
from persimmon.infer.paged import PagedChunk, PagedDecoder
from persimmon.infer.params import SamplingParams
from persimmon.infer.sampling import TokenLogprob, banned_ids, log_probability
from persimmon.infer.scheduler import ScheduledRequest, Scheduler, Work
from persimmon.tokenizer import Tokenizer

STEP_TOKENS = 256
"""Tokens of one step: what an answering request waits at most for the prompts of others."""


Outcome: TypeAlias = Picked | Exception | None
"""What the decoder gave for one piece of work."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    """With a seed, if the request is to be taken up again after a failure."""
    skip_space: bool = False
    """Drop one space at the head of the text, as chats do."""
    prompt_logprobs: int | None = None
    """Also report log-probabilities of the prompt's tokens, with so many alternatives."""
    grammar: Grammar | None = None
    replayed: tuple[int, ...] = ()
    """Tokens of the answer that are known already; their text is not reported again."""
    replayed_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a request ended without an answer."""

    message: str
    kind: Literal["input", "context", "engine"]
    """The request was wrong, did not fit, or the engine broke."""


class Update(NamedTuple):
    """What is new about a request."""

    request_id: str
    piece: Piece | None = None
    prompt_done: int = 0
    """Tokens of the prompt that are read, while it is being read."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One per prompt token, the first None; comes with the first piece."""
    finish_reason: str | None = None
    usage: Usage | None = None
    """At the end."""
    failure: Failure | None = None


ACTIVE_STEPS = 32
"""Steps between two looks at the shares of active values: a message goes out every step, and nobody reads as often."""


class EngineState(NamedTuple):
    """What the engine is doing, for monitoring."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_held: int = 0
    prompt_tokens_queried: int = 0
    prompt_tokens_found: int = 0
    preemptions: int = 0
    tokens_computed: int = 0
    active_fraction: tuple[float, ...] = ()
    """Per layer, the share of MLP values that are not zero, as of one of the last ACTIVE_STEPS steps or the end of all
    work; empty where the decoder does not count."""


@dataclass(eq=False)
class _Running:
    """A request between submission and end."""

    request: Request
    scheduled: ScheduledRequest
    completion: Completion
    constraint: Constraint | None
    prompt_logprobs: list[TokenLogprob | None] | None
    """Gathered until they are reported; None when there is nothing to gather."""

    @property
    def scoring(self) -> bool:
        """Log-probabilities of the prompt are still missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.request.prompt_ids)


class Engine:
    """Requests in, updates out. Not for several threads at once."""

    def __init__(
        self,
        decoder: PagedDecoder,
        tokenizer: Tokenizer,
        *,
        max_running: int = 16,
        step_tokens: int = STEP_TOKENS,
        context: int | None = None,
    ) -> None:
        """At most `max_running` requests share a step of `step_tokens` tokens; `context` limits each of them."""
        self._decoder, self._tokenizer = decoder, tokenizer
        self._drawing = decoder if isinstance(decoder, DrawingDecoder) else None
        self._blocks = BlockAllocator(decoder.num_blocks, decoder.block_size)
        self._scheduler = Scheduler(self._blocks, max_running=max_running, step_tokens=max(step_tokens, max_running))
        self.context = min(context or decoder.config.max_positions, decoder.config.max_positions)
        self._num_rows = decoder.config.vocab_size
        self._banned = banned_ids(tokenizer, self._num_rows)
        self._grammars = GrammarCompiler(tokenizer, self._num_rows)
        self._requests: dict[str, _Running] = {}
        self._by_scheduled: dict[ScheduledRequest, _Running] = {}
        self._tokens_computed = 0
        self._steps = self._look_again = 0  # steps so far, and the one at which the active values are looked at again
        self._active_fraction: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The decoder's name."""
        return self._decoder.name

    @property
    def busy(self) -> bool:
        """There is something to do."""
        return bool(self._requests)

    @property
    def state(self) -> EngineState:
        """For monitoring."""
        scheduler = self._scheduler
        if self._steps >= self._look_again or not self.busy:
            self._look_again = self._steps + ACTIVE_STEPS
            self._active_fraction = tuple(getattr(self._decoder, "active_fraction", ()))
        return EngineState(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=self._blocks.num_blocks,
            blocks_held=self._blocks.num_held,
            prompt_tokens_queried=scheduler.prompt_tokens_queried,
            prompt_tokens_found=scheduler.prompt_tokens_found,
            preemptions=scheduler.num_preemptions,
            tokens_computed=self._tokens_computed,
            active_fraction=self._active_fraction,
        )

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self._scheduler.capacity

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError or ContextLengthError, and then nothing is queued."""
        if request.id in self._requests:
            raise InputError(f"a request with the id {request.id!r} is running")
        self._check_prompt(request.prompt_ids)
        running = self._prepare(request)
        self._scheduler.add(running.scheduled)
        self._requests[request.id] = running
        self._by_scheduled[running.scheduled] = running

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing happens when it has ended."""
        if request_id in self._requests:
            self._remove(self._requests[request_id])

    def step(self) -> list[Update]:
        """Run the model once for everyone whose turn it is; returns what is new."""
        self._steps += 1
        step = self._scheduler.schedule()
        self._decoder.copy_blocks(step.copies)
        outcomes = self._run(step.work)
        return [self._advance(work, outcome) for work, outcome in zip(step.work, outcomes, strict=True)]

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise InputError("the prompt holds no tokens")
        if len(prompt_ids) > self.context:
            raise ContextLengthError(f"the prompt has {len(prompt_ids)} tokens and the context {self.context}")
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self._num_rows:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {self._num_rows}")

    def _prepare(self, request: Request) -> _Running:
        completion = Completion(
            self._tokenizer, request.params, self._banned, self._num_rows, request.prompt_ids,
            skip_space=request.skip_space,
        )  # fmt: skip
        constraint = self._grammars.compile(request.grammar) if request.grammar is not None else None
        completion.replay(request.replayed, request.replayed_logprobs)
        if constraint is not None:
            for token_id in request.replayed:
                constraint.accept(token_id)
        scheduled = ScheduledRequest(
            [*request.prompt_ids, *request.replayed],
            max_length=min(len(request.prompt_ids) + request.params.max_tokens - 1, self.context),
            reuse=self._decoder.shares_blocks and request.prompt_logprobs is None,
        )
        return _Running(
            request, scheduled, completion, constraint, [None] if request.prompt_logprobs is not None else None
        )

    def _remove(self, running: _Running) -> None:
        del self._requests[running.request.id]
        del self._by_scheduled[running.scheduled]
        self._scheduler.remove(running.scheduled)

    def _run(self, work: Sequence[Work]) -> list[Outcome]:
        """Logits of each piece of work; when the decoder fails, each runs alone to find out whose fault it is."""
        chunks = [self._chunk(item) for item in work]
        outcomes: list[Outcome] = []
        try:
            if chunks:
                draws = [self._draw(item) for item in work] if self._drawing is not None else []
                if self._drawing is not None and any(draws):
                    outcomes += self._drawing.draw(chunks, draws, self._banned)
                else:
                    outcomes += self._decoder.forward(chunks, exact_top=self._exact_top(work))
        except Exception as error:
            if len(work) == 1:
                return [error]
            return [outcome for item in work for outcome in self._run([item])]
        self._tokens_computed += sum(item.end - item.start for item in work)
        return outcomes

    def _chunk(self, work: Work) -> PagedChunk:
        request = work.request
        logits: Literal["none", "last", "all"] = "last" if work.samples else "none"
        if self._by_scheduled[request].scoring:
            logits = "all"
        return PagedChunk(request.table.blocks, work.start, request.token_ids[work.start : work.end], logits)

    def _draw(self, work: Work) -> Draw | None:
        """The next token of a request, where a decoder can pick it itself."""
        running = self._by_scheduled[work.request]
        params = running.request.params
        if not work.samples or running.scoring or running.constraint is not None or not can_draw(params):
            return None
        return Draw(params, running.completion.sampler.seed, len(running.completion.token_ids))

    def _exact_top(self, work: Sequence[Work]) -> int | None:
        """The most that any of the requests needs; None is everything."""
        running = [(self._by_scheduled[item.request], item.samples) for item in work]
        tops = [self._needed_top(one) for one, samples in running if samples]
        if any(one.scoring for one, _ in running) or None in tops:
            return None
        return max((top for top in tops if top is not None), default=1)

    def _needed_top(self, running: _Running) -> int | None:
        return None if running.constraint is not None else running.completion.sampler.exact_top

    def _advance(self, work: Work, outcome: Outcome) -> Update:
        """Book the work, let the request pick its token, and say what is new."""
        running = self._by_scheduled[work.request]
        if isinstance(outcome, Exception):
            return self._fail(running, f"the engine failed: {type(outcome).__name__}: {outcome}", "engine")
        self._scheduler.advance(work)
        logits = outcome
        if logits is not None and not isinstance(logits, int) and logits.ndim == 2:
            self._score_prompt(running, work, logits)
            logits = logits[-1]
        if not work.samples:
            return Update(running.request.id, prompt_done=min(work.end, len(running.request.prompt_ids)))
        assert logits is not None, "logits were asked for"
        try:
            piece = self._pick(running, logits)
        except InputError as error:
            return self._fail(running, str(error), "input")
        except PersimmonError as error:
            return self._fail(running, str(error), "engine")
        return self._report(running, piece)

    def _pick(self, running: _Running, logits: Picked) -> Piece | None:
        """The next token of a request."""
        constraint, completion = running.constraint, running.completion
        piece = completion.accept(logits, constraint.allowed() if constraint is not None else None)
        token_id = completion.token_ids[-1]
        if constraint is not None and token_id != self._tokenizer.eos_id:
            constraint.accept(token_id)
        running.scheduled.token_ids.append(token_id)
        if completion.finish_reason is None and running.scheduled.num_computed >= self.context:
            return _joined(piece, completion.end())
        return piece

    def _report(self, running: _Running, piece: Piece | None) -> Update:
        completion, request = running.completion, running.request
        scores, running.prompt_logprobs = running.prompt_logprobs, None
        usage = None
        if completion.finish_reason is not None:
            cached = min(running.scheduled.num_cached, len(request.prompt_ids))
            usage = Usage(len(request.prompt_ids), len(completion.token_ids), cached)
            self._remove(running)
        return Update(
            request.id,
            piece=piece,
            prompt_done=len(request.prompt_ids),
            prompt_logprobs=None if scores is None else tuple(scores),
            finish_reason=completion.finish_reason,
            usage=usage,
        )

    def _score_prompt(self, running: _Running, work: Work, logits: Logits) -> None:
        """Log-probabilities of the prompt's tokens that stand behind the work's positions."""
        ids, count = running.request.prompt_ids, running.request.prompt_logprobs
        scores = running.prompt_logprobs
        assert scores is not None and count is not None, "logits of the whole prompt are for scoring it"
        for position in range(len(scores), min(work.end + 1, len(ids))):
            scores.append(log_probability(logits[position - 1 - work.start], ids[position], count))

    def _fail(self, running: _Running, message: str, kind: Literal["input", "engine"]) -> Update:
        self._remove(running)
        return Update(running.request.id, failure=Failure(message, kind))


def _joined(first: Piece | None, second: Piece) -> Piece:
    """Two pieces as one."""
    if first is None:
        return second
    return Piece(first.text + second.text, first.token_ids + second.token_ids, first.logprobs + second.logprobs)


def num_blocks_for(context: int, max_running: int, token_bytes: int, budget: int, block_size: int) -> int:
    """Blocks of a cache within `budget` bytes: every running request's whole context if that fits, one at least."""
    blocks_per_context = -(-context // block_size)
    affordable = budget // (token_bytes * block_size)
    return int(np.clip(affordable, blocks_per_context, blocks_per_context * max_running))
