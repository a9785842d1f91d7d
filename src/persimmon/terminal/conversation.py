"""What was said: a system text, exchanges of question and answer, and files waiting for the next question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from persimmon.terminal.attachments import TextFile

Message = dict[str, str]
"""`role` and `content`, as `persimmon.chat` takes them."""


@dataclass(frozen=True)
class Exchange:
    """One question, the files that went with it, and the answer."""

    question: str
    files: tuple[TextFile, ...] = ()
    answer: str = ""

    @property
    def prompt(self) -> str:
        """What the model is given: each file in a fenced block under its name, then the question."""
        return "\n\n".join([*(file.fenced() for file in self.files), self.question])


@dataclass
class Conversation:
    """Everything a person can save, load and undo."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    files: list[TextFile] = field(default_factory=list)
    """They go with the next question."""

    def messages(self, *, asking: Exchange | None = None) -> list[Message]:
        """The conversation for the model; `asking` is an exchange whose answer is still to come."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            messages += [_user(exchange), {"role": "assistant", "content": exchange.answer}]
        return messages + ([_user(asking)] if asking else [])

    def attach(self, file: TextFile) -> bool:
        """Put a file with the next question; True if it took the place of one with the same name."""
        others = [other for other in self.files if other.name != file.name]
        replaced = len(others) < len(self.files)
        self.files = [*others, file]
        return replaced

    def undo(self) -> Exchange | None:
        """Take the last exchange back; its files wait for the next question again."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        waiting = {file.name for file in self.files}
        self.files = [*(file for file in last.files if file.name not in waiting), *self.files]
        return last

    def clear(self) -> None:
        """Forget exchanges and files; the system text stays."""
        self.exchanges.clear()
        self.files.clear()


def exchanges_of(messages: Sequence[Message]) -> list[Exchange]:
    """The exchanges of alternating user and assistant messages."""
    questions, answers = messages[0::2], messages[1::2]
    return [Exchange(q["content"], (), a["content"]) for q, a in zip(questions, answers, strict=True)]


def _user(exchange: Exchange) -> Message:
    return {"role": "user", "content": exchange.prompt}
