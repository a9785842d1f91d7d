"""Streaming generation: read the prompt, then one token after the other, whatever the decoder.

When the context is full (`SamplingParams.context_overflow`), with C its size in tokens:

* `error`: a prompt longer than C is refused; an answer that reaches the end of the context ends with reason
  `length`. The last token is never stored, so a prompt of C tokens still gets one.
* `truncate-left`: the oldest tokens of the prompt are dropped, so that the answer's max_tokens fit behind it, but
  never below C/2 tokens; the answer ends as under `error`.
* `shift`: whenever the context is full, everything but its newest half is dropped and that half is read again, as
  if the text began there: exact for the window, and the answer is as long as max_tokens says.

A leading begin-of-text token always stays.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from persimmon.errors import ContextLengthError
from persimmon.infer.completion import Completion, Generation, Piece, Timings, Usage
from persimmon.infer.decoder import Decoder, check_token_ids
from persimmon.infer.drawing import Draw, DrawingDecoder, GreedyDecoder, Picked, can_draw, steps_ahead
from persimmon.infer.lookup import Lookup, check_lookup
from persimmon.infer.params import SamplingParams
from persimmon.infer.prompt_file import check_place
from persimmon.infer.sampling import banned_ids
from persimmon.infer.session import Drawing, Greedy, ReportProgress, Session
from persimmon.tokenizer import Tokenizer


class Stream(Iterator[Piece]):
    """The pieces of one request as they come; `result()` has the whole, also after an interruption."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        context: int | None = None,
        session: Session | None = None,
        skip_space: bool = False,
        progress: ReportProgress | None = None,
        lookup: int = 0,
        prompt_cache: Path | None = None,
    ) -> None:
        """Checks the request; the model runs when the first piece is asked for.

        session: a sequence to reuse (its capacity is the context), left open at the end.
        context: the size of the context when there is no session; default the model's.
        skip_space: drop one space at the head of the text.
        progress: called while the prompt is read.
        lookup: guess up to so many tokens from the text itself and run them in one call (infer/lookup.py); 0 never.
        prompt_cache: a file with keys and values (infer/prompt_file.py). What it has of the prompt is not read by the
            model; it is written, once the prompt is read, if it had less than half of it or was not there.
        """
        check_lookup(lookup)
        if prompt_cache is not None:
            check_place(prompt_cache)
        config = decoder.config
        check_token_ids("the prompt", prompt_ids, config.vocab_size)
        if session is None:
            self._session = Session(decoder, config.max_positions if context is None else context)
        else:
            self._session = session
        self._close_session = session is None
        capacity = self._session.capacity
        self._prompt_ids = fit_prompt(prompt_ids, capacity, params, tokenizer.bos_id)
        self._banned = banned = banned_ids(tokenizer, config.vocab_size)
        self._completion = Completion(
            tokenizer, params, banned, config.vocab_size, self._prompt_ids, skip_space=skip_space
        )
        self._params, self._bos_id, self._eos_id = params, tokenizer.bos_id, tokenizer.eos_id
        may_draw = not lookup and can_draw(params)
        self._draws = may_draw and isinstance(decoder, DrawingDecoder)
        self._runs_ahead = may_draw and params.greedy and isinstance(decoder, GreedyDecoder)
        self._progress, self._prompt_cache = progress, prompt_cache
        self._max_guess, self._lookup = lookup, Lookup(self._prompt_ids) if lookup else None
        self._guessed = self._guesses_right = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._cached_tokens = 0
        self.finished = False
        """No more pieces will come."""
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here; nothing more is generated."""
        self._pieces.close()
        self.finished = True

    def result(self) -> Generation:
        """What has come so far; finish_reason is None until the end."""
        done = self._completion
        count, seconds = len(done.token_ids), self._decode_seconds
        speed = (count - 1) / seconds if count > 1 and seconds > 0 else 0.0
        return Generation(
            text=done.text,
            token_ids=list(done.token_ids),
            finish_reason=done.finish_reason,
            stop=done.stop,
            usage=Usage(len(self._prompt_ids), count, self._cached_tokens, self._guessed, self._guesses_right),
            timings=Timings(self._prefill_seconds, seconds, speed),
            seed=done.sampler.seed,
            logprobs=list(done.logprobs) if self._params.logprobs is not None else None,
        )

    def _run(self) -> Generator[Piece]:
        done = self._completion
        try:
            started = time.perf_counter()
            logits = self._read_prompt()
            piece = done.accept(logits)
            self._prefill_seconds = time.perf_counter() - started
            while True:
                if piece is not None:
                    yield piece
                if done.finish_reason is not None:
                    return
                started = time.perf_counter()
                piece = self._step()
                self._decode_seconds += time.perf_counter() - started
        finally:
            self.finished = True
            if self._close_session:
                self._session.close()

    def _step(self) -> Piece | None:
        """Store the newest token and pick the next; the end, when there is no room and no shifting."""
        if not self._session.room and self._params.context_overflow != "shift":
            return self._completion.end()
        return self._completion.accept(self._store(self._completion.token_ids[-1]))

    def _read_prompt(self) -> Picked:
        """The logits behind the prompt, with what the session and the prompt file already have of it."""
        found, path = 0, self._prompt_cache
        if path is not None and path.exists():
            found = self._session.restore(path, self._prompt_ids)
        logits = self._session.prefill(
            self._prompt_ids, exact_top=self._completion.sampler.exact_top, progress=self._progress, draw=self._draw()
        )
        self._cached_tokens = self._session.reused
        if path is not None and 2 * found < len(self._prompt_ids):
            self._session.save(path)
        return logits

    def _draw(self) -> Drawing | None:
        """The next token, for a decoder that picks tokens itself; not with guesses, which need logits to compare."""
        if not self._draws:
            return None
        done = self._completion
        return Draw(self._params, done.sampler.seed, len(done.token_ids)), self._banned

    def _store(self, token_id: int) -> Picked:
        exact_top = self._completion.sampler.exact_top
        if self._lookup is not None:
            self._lookup.append(token_id)
        if self._session.room:
            if self._runs_ahead:
                steps = None if self._session.expects(token_id) else self._greedy()
                return self._session.extend(token_id, greedy=steps)
            if self._lookup is None:
                return self._session.extend(token_id, exact_top=exact_top, draw=self._draw())
            return self._session.extend(token_id, exact_top=exact_top, guess=self._guess(token_id))
        window = newest([*self._session.token_ids, token_id], _half(self._session.capacity), self._bos_id)
        return self._session.prefill(window, exact_top=exact_top, draw=self._draw())

    def _greedy(self) -> Greedy:
        """As many steps as are short together, as there is room for, and as are wanted: the last is never stored."""
        count = len(self._completion.token_ids)
        seconds = self._decode_seconds / (count - 1) if count > 1 else 0.0
        most = min(self._session.room, self._params.max_tokens - count)
        return Greedy(steps_ahead(seconds, most), self._banned, self._eos_id)

    def _guess(self, token_id: int) -> list[int]:
        """What may follow the token, no more than there is room for; nothing where the last guess still holds."""
        assert self._lookup is not None, "only asked for when there is something to look in"
        if self._session.expects(token_id):
            self._guesses_right += 1
            return []
        room = self._session.room - 1
        left = self._params.max_tokens - len(self._completion.token_ids) - 1  # the last token is never stored
        guess = self._lookup.guess(min(self._max_guess, room, max(left, 0)))
        self._guessed += len(guess)
        return guess


def fit_prompt(prompt_ids: Sequence[int], capacity: int, params: SamplingParams, bos_id: int) -> list[int]:
    """The prompt as it is run under `params.context_overflow`; raises ContextLengthError under `error`."""
    length = len(prompt_ids)
    if params.context_overflow == "truncate-left":
        limit = max(_half(capacity), capacity - params.max_tokens + 1)
    else:
        limit = capacity
    if length <= limit:
        return list(prompt_ids)
    if params.context_overflow == "error":
        raise ContextLengthError(
            f"the prompt has {length} tokens and the context {capacity}; "
            "context_overflow 'truncate-left' or 'shift' drops the oldest"
        )
    return newest(prompt_ids, limit if params.context_overflow == "truncate-left" else _half(capacity), bos_id)


def newest(token_ids: Sequence[int], count: int, bos_id: int) -> list[int]:
    """The last `count` of more than `count` ids; a leading begin-of-text stays as the first of them."""
    if token_ids[0] == bos_id and count > 1:
        return [bos_id, *token_ids[len(token_ids) - count + 1 :]]
    return list(token_ids[len(token_ids) - count :])


def _half(capacity: int) -> int:
    """Tokens that stay of a full context: half of it, rounded up."""
    return (capacity + 1) // 2
