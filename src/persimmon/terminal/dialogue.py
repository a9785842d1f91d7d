"""A conversation with a model: questions in, streamed answers out, and the context kept in view. Knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from persimmon import chat
from persimmon.errors import ContextLengthError, InputError, PersimmonError
from persimmon.terminal.attachments import TextFile
from persimmon.terminal.conversation import Conversation, Exchange, Message
from persimmon.terminal.gauge import Fullness
from persimmon.terminal.settings import Settings

if TYPE_CHECKING:
    from persimmon.infer.completion import Generation, Piece
    from persimmon.tokenizer import Tokenizer

ReportProgress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

ANSWER_ROOM = 64
"""Tokens: room for a few sentences."""

ROOM_AFTER_DROPPING = 0.25
"""Share of the context that dropping frees: the next turns then find the head of the prompt unchanged, and reuse it."""


class AnswerStream(Protocol):
    """What `Persimmon.stream_chat` returns."""

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of the answer."""

    def close(self) -> None:
        """Stop here."""

    def result(self) -> Generation:
        """What has come so far."""


class ChatModel(Protocol):
    """The part of `persimmon.Persimmon` that a dialogue needs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Counts the tokens of texts."""

    @property
    def context(self) -> int:
        """Longest context in tokens."""

    def stream_chat(
        self, messages: Sequence[Message], *, progress: ReportProgress | None = None, **sampling: Any
    ) -> AnswerStream:
        """Answer the last message."""


class Reply:
    """One answer while it streams: iterate for its text, then hand it to `Dialogue.keep`."""

    def __init__(self, exchange: Exchange, max_tokens: int, start: Callable[[ReportProgress], AnswerStream]) -> None:
        self.exchange = exchange
        self.dropped = 0
        """Old exchanges that were let go to make room."""
        self.replaced: Exchange | None = None
        """The exchange that this is another answer to."""
        self.on_reading: ReportProgress | None = None
        """Called with (done, total) tokens while a long prompt is read; what it raises ends the answer."""
        self._max_tokens = max_tokens
        self._stream = start(self._reading)
        self._text = ""

    def __iter__(self) -> Iterator[str]:
        """Text as it comes, without space at its head."""
        for piece in self._stream:
            text = piece.text if self._text else piece.text.lstrip()
            if text:
                self._text += text
                yield text

    def stop(self) -> None:
        """Generate nothing more; the text so far is the answer."""
        self._stream.close()

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text.rstrip()

    def _reading(self, done: int, total: int) -> None:
        if self.on_reading is not None:
            self.on_reading(done, total)

    def facts(self) -> list[str]:
        """How the answer ended, if not by itself, then tokens and speed."""
        result = self._stream.result()
        count, speed = result.usage.completion_tokens, result.timings.tokens_per_second
        facts = [f"{count:,} token{'' if count == 1 else 's'}"]
        if speed > 0:
            facts.append(f"{speed:,.0f} tokens/s" if speed >= 10 else f"{speed:.1f} tokens/s")
        if result.finish_reason is None:
            return ["stopped", *facts]
        if result.finish_reason == "length":
            return ["max_tokens reached" if count >= self._max_tokens else "context full", *facts]
        return facts


class Dialogue:
    """A conversation, the model that answers in it, and the settings it answers with."""

    def __init__(
        self,
        model: ChatModel,
        settings: Settings,
        system: str = "",
        *,
        lookup: int = 0,
        prompt_cache: str | None = None,
    ) -> None:
        """`lookup` and `prompt_cache` as in `Persimmon.stream_chat`."""
        self._running = {"lookup": lookup, "prompt_cache": prompt_cache} if lookup or prompt_cache else {}
        self.model = model
        self.settings = settings
        self.conversation = Conversation(system)
        self._retries = 0

    @property
    def answer_room(self) -> int:
        """Tokens that must be free for an answer before a question is sent."""
        return min(ANSWER_ROOM, self.model.context // 4)

    def ask(self, question: str) -> Reply:
        """Send a question with the waiting files. Raises ContextLengthError when it does not fit, changing nothing."""
        self._retries = 0
        return self._reply(Exchange(question, tuple(self.conversation.files)))

    def retry(self) -> Reply:
        """Answer the last question once more, with another seed."""
        if not self.conversation.exchanges:
            raise InputError("there is no question yet to answer again")
        last = self.conversation.exchanges.pop()
        self._retries += 1
        try:
            return self._reply(Exchange(last.question, last.files), replaced=last)
        except PersimmonError:
            self.conversation.exchanges.append(last)
            raise

    def open(self, conversation: Conversation, settings: Settings) -> None:
        """Go on with another conversation; files that wait for the next message go with it."""
        for file in self.conversation.files:
            conversation.attach(file)
        self.conversation, self.settings = conversation, settings
        self._retries = 0

    def keep(self, reply: Reply) -> bool:
        """Make an answer, whole or partial, part of the conversation; False if there is no text to keep."""
        if not reply.text:
            if reply.replaced:
                self.conversation.exchanges.append(reply.replaced)
            return False
        asked = reply.exchange
        self.conversation.exchanges.append(Exchange(asked.question, asked.files, reply.text))
        if reply.replaced is None:
            self.conversation.files.clear()
        return True

    def attach(self, file: TextFile) -> bool:
        """Let a file wait for the next question; one that leaves no room for question and answer is refused."""
        tokens = self.count_text(file.fenced())
        others = sum(self.count_text(other.fenced()) for other in self.conversation.files if other.name != file.name)
        free = self.model.context - self.answer_room - self.count() - others
        if tokens > free:
            raise ContextLengthError(
                f"{file.name} has {tokens:,} tokens, but only {max(free, 0):,} of {self.model.context:,} are free"
            )
        return self.conversation.attach(file)

    def count(self, asking: Exchange | None = None) -> int:
        """Tokens of the conversation as the model reads it; `asking` adds a question and the cue to answer it."""
        conversation = self.conversation
        if not conversation.exchanges and asking is None:
            return self.count_text(conversation.system)
        messages = conversation.messages(asking=asking)
        return len(chat.encode(self.model.tokenizer, messages, add_generation_prompt=asking is not None))

    def count_text(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.model.tokenizer.encode(text))

    def fullness(self) -> Fullness:
        """Tokens in use: the conversation and the waiting files."""
        waiting = sum(self.count_text(file.fenced()) for file in self.conversation.files)
        return Fullness(self.count() + waiting, self.model.context)

    def _reply(self, exchange: Exchange, replaced: Exchange | None = None) -> Reply:
        dropped = self._make_room(exchange)
        sampling = self.settings.sampling()
        if sampling["seed"] is not None:
            sampling["seed"] += self._retries
        messages = self.conversation.messages(asking=exchange)
        reply = Reply(
            exchange,
            sampling["max_tokens"],
            lambda progress: self.model.stream_chat(messages, progress=progress, **self._running, **sampling),
        )
        reply.dropped, reply.replaced = dropped, replaced
        return reply

    def _make_room(self, exchange: Exchange) -> int:
        """Drop old exchanges, if allowed, until the question fits: as many as needed, or none. Returns their number."""
        limit = self.model.context - self.answer_room
        before = self.conversation.exchanges
        needed = self.count(exchange)
        if needed > limit and self.settings.drop_oldest:
            kept = self.conversation.exchanges = list(before)
            while kept and needed > limit - ROOM_AFTER_DROPPING * self.model.context:
                del kept[0]
                needed = self.count(exchange)
        if needed > limit:
            self.conversation.exchanges = before
            what = "the question alone" if needed < self.count(exchange) or not before else "the conversation"
            raise ContextLengthError(
                f"{what} needs {needed:,} tokens; the context has {self.model.context:,}, "
                f"of which {self.answer_room:,} are kept for the answer"
            )
        return len(before) - len(self.conversation.exchanges)
