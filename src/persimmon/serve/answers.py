"""Updates of the engine as OpenAI answers: whole, or chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from persimmon.infer.completion import Piece, Usage
from persimmon.infer.engine import Request, Update
from persimmon.infer.sampling import TokenLogprob
from persimmon.tokenizer import IncrementalDecoder, Tokenizer

Json = dict[str, Any]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as the interface shows it: its text; bytes of a part of a character; the name of a control piece."""
    if token_id >= tokenizer.vocab_size:
        return f"<row {token_id}>"
    content = tokenizer.piece_bytes(token_id)
    if not content:
        return tokenizer.piece(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass
class _Choice:
    """One answer of several."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    begun: bool = False


def _num_tokens(choice: _Choice) -> int:
    """Of an answer that has ended or not."""
    return choice.usage.completion_tokens if choice.usage is not None else len(choice.token_ids)


class Format(Protocol):
    """How one kind of answer looks."""

    def whole(self) -> Json:
        """The answer when everything has ended."""

    def chunks(self, index: int, update: Update) -> Iterator[Json]:
        """The chunks that an update adds to a stream."""


class _Answer:
    """What both kinds share: identity, choices, usage."""

    object_name: str
    chunk_name: str

    def __init__(
        self, answer_id: str, model: str, tokenizer: Tokenizer, requests: Sequence[Request], *, with_usage: bool = False
    ) -> None:
        """`with_usage`: chunks have a usage field, as `stream_options.include_usage` asks for."""
        self._id, self._model, self._tokenizer = answer_id, model, tokenizer
        self._requests = requests
        self._created = int(time.time())
        self._with_usage = with_usage
        self.choices = [_Choice() for _ in requests]

    def note(self, index: int, update: Update) -> None:
        """Remember an update."""
        choice = self.choices[index]
        if update.piece is not None:
            choice.texts.append(update.piece.text)
            choice.token_ids.extend(update.piece.token_ids)
            choice.logprobs.extend(update.piece.logprobs)
        if update.prompt_logprobs is not None:
            choice.prompt_logprobs = update.prompt_logprobs
        if update.finish_reason is not None:
            choice.finish_reason, choice.usage = update.finish_reason, update.usage

    def usage(self) -> Json:
        """Token counts; a prompt that several choices share counts once."""
        prompts = {id(r.prompt_ids): len(r.prompt_ids) for r in self._requests}
        prompt, answer = sum(prompts.values()), sum(map(_num_tokens, self.choices))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
        }

    def _cached_tokens(self) -> int:
        """Prompt tokens that were not computed. Of a prompt's choices the first finds the least, the others find it."""
        found: dict[int, int] = {}
        for request, choice in zip(self._requests, self.choices, strict=True):
            if choice.usage is not None:
                prompt, cached = id(request.prompt_ids), choice.usage.cached_tokens
                found[prompt] = min(cached, found.get(prompt, cached))
        return sum(found.values())

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        """A chunk of a stream."""
        usage = {"usage": None} if self._with_usage else {}
        return self._head(self.chunk_name) | {"choices": choices} | usage | more

    def _head(self, name: str) -> Json:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": "persimmon",
        }


class ChatAnswer(_Answer):
    """`chat.completion` and its chunks."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def whole(self) -> Json:
        """The complete answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": self._logprobs(choice.logprobs, self._requests[index]),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head(self.object_name) | {"choices": choices, "usage": self.usage()}

    def chunks(self, index: int, update: Update) -> Iterator[Json]:
        """First the role, then text, at last the reason of the end."""
        choice = self.choices[index]
        if not choice.begun:
            choice.begun = True
            yield self._delta(index, {"role": "assistant", "content": ""})
        piece = update.piece
        if piece is not None and (piece.text or piece.logprobs):
            yield self._delta(index, {"content": piece.text}, self._logprobs(piece.logprobs, self._requests[index]))
        if update.finish_reason is not None:
            yield self._delta(index, {}, finish_reason=update.finish_reason)

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return self.chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _logprobs(self, entries: Sequence[TokenLogprob], request: Request) -> Json | None:
        if request.params.logprobs is None:
            return None
        shown = [entry for entry in entries if entry.token_id != self._tokenizer.eos_id]
        return {"content": [self._entry(entry) for entry in shown], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> Json:
        others = [self._token(token_id, value) for token_id, value in entry.alternatives]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": others}

    def _token(self, token_id: int, logprob: float) -> Json:
        known = token_id < self._tokenizer.vocab_size
        content = self._tokenizer.piece_bytes(token_id) if known else b""
        return {"token": token_text(self._tokenizer, token_id), "logprob": _finite(logprob), "bytes": list(content)}


class CompletionAnswer(_Answer):
    """`text_completion`, whole and in chunks; with `echo` the prompt stands before the answer."""

    object_name = chunk_name = "text_completion"

    def __init__(self, *args: Any, echo: bool = False, answer: bool = True, **options: Any) -> None:
        """`answer=False` leaves out what was generated (`max_tokens` 0)."""
        super().__init__(*args, **options)
        self._echo, self._answer = echo, answer
        self._places = [_Places(self._tokenizer) for _ in self.choices]

    def whole(self) -> Json:
        """The complete answer."""
        choices = []
        for index, choice in enumerate(self.choices):
            piece = Piece("".join(choice.texts), tuple(choice.token_ids), tuple(choice.logprobs))
            text, logprobs = self._parts(index, piece, choice.prompt_logprobs, first=True)
            choices.append(
                {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": self._reason(choice.finish_reason),
                }
            )
        return self._head(self.object_name) | {"choices": choices, "usage": self.usage()}

    def chunks(self, index: int, update: Update) -> Iterator[Json]:
        """Text as it comes; the last chunk says why it ended."""
        choice = self.choices[index]
        if update.piece is None and update.finish_reason is None:
            return
        piece = update.piece or Piece("", ())
        text, logprobs = self._parts(index, piece, choice.prompt_logprobs, first=not choice.begun)
        choice.begun = True
        reason = self._reason(update.finish_reason)
        yield self.chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def usage(self) -> Json:
        """Without an answer, its tokens do not count."""
        usage = super().usage()
        if not self._answer:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _reason(self, reason: str | None) -> str | None:
        return "length" if reason is not None and not self._answer else reason

    def _parts(
        self, index: int, piece: Piece, prompt_logprobs: Sequence[TokenLogprob | None], *, first: bool
    ) -> tuple[str, Json | None]:
        """Text and log-probabilities of a stretch of the answer, after the prompt where it is wanted."""
        request = self._requests[index]
        entries: list[tuple[int, TokenLogprob | None]] = []
        text = ""
        if self._echo and first:
            text = self._tokenizer.decode(request.prompt_ids)
            entries += zip(request.prompt_ids, prompt_logprobs, strict=False)
        elif first:
            self._places[index].begin_answer()
        if self._answer:
            text += piece.text
            entries += [(entry.token_id, entry) for entry in piece.logprobs]
        if request.params.logprobs is None:
            return text, None
        return text, self._logprobs(index, entries)

    def _logprobs(self, index: int, entries: Sequence[tuple[int, TokenLogprob | None]]) -> Json:
        """The columns of the completions interface; the first token of a text has no log-probability."""
        tokens = [token_text(self._tokenizer, token_id) for token_id, _ in entries]
        offsets = [self._places[index].next(token_id) for token_id, _ in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the one that came; of tokens with the same text, the more likely."""
        found: dict[str, float] = {}
        for token_id, value in (*entry.alternatives, (entry.token_id, entry.logprob)):
            found.setdefault(token_text(self._tokenizer, token_id), _finite(value))
        return found


class _Places:
    """Where tokens begin in their text, in characters; all bytes of a character share its place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._place = 0

    def begin_answer(self) -> None:
        """The text goes on after a prompt that is not part of it."""
        self._decoder = IncrementalDecoder(self._tokenizer, continuation=True)

    def next(self, token_id: int) -> int:
        """The place of the token that comes next."""
        place = self._place
        if token_id < self._tokenizer.vocab_size:
            self._place += len(self._decoder.add(token_id))
        return place


def _finite(value: float) -> float:
    """JSON has no infinity; nothing that can be sampled comes near this."""
    return max(value, -9_999.0)
