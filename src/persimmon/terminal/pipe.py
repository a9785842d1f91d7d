"""The chat without a terminal: every line of a stream is one turn, answers are plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from persimmon.errors import ContextLengthError, InputError
from persimmon.terminal.dialogue import Dialogue, Reply
from persimmon.terminal.view import AnswerView, PlainView

BUILT_IN_QUESTION = "I would like to book a table at a restaurant."
"""Asked when there is nothing to answer: a task the shipped model was trained for."""

Report = Callable[[Reply], None]
"""Told about every finished answer."""


def answer(dialogue: Dialogue, question: str, view: AnswerView) -> Reply:
    """One turn. Raises ContextLengthError, with the way out, when the conversation is too long."""
    try:
        reply = dialogue.ask(question)
    except ContextLengthError as error:
        if dialogue.settings.drop_oldest or not dialogue.conversation.exchanges:
            raise
        raise ContextLengthError(f"{error}; --drop-oldest lets the oldest turns go") from None
    try:
        for text in reply:
            view.add(text)
    finally:
        reply.stop()
        view.finish()
    dialogue.keep(reply)
    return reply


def answer_lines(dialogue: Dialogue, lines: Iterable[str], file: IO[str], report: Report) -> None:
    """Answer each line that is not blank, as one conversation, with an empty line between two answers.

    Without any such line the built-in question is printed and answered. Nothing is a command here.
    """
    asked = 0
    for line in lines:
        if question := line.strip():
            file.write("\n" if asked else "")
            report(answer(dialogue, question, PlainView(file)))
            asked += 1
    if not asked:
        file.write(f"> {BUILT_IN_QUESTION}\n\n")
        report(answer(dialogue, BUILT_IN_QUESTION, PlainView(file)))


def text_lines(stream: IO[str] | None) -> Iterator[str]:
    """The lines of standard input, none if it is closed; an InputError if it is not text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="strict")  # some locales let wrong bytes through
    try:
        yield from stream or ()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"standard input is not {error.encoding} text: {error.reason} 0x{byte:02x}") from None
