"""The interactive chat: reads, answers, obeys commands, until the person leaves."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from persimmon.errors import ContextLengthError, PersimmonError
from persimmon.terminal.commands import Commands, Outcome, is_command, unwrapped
from persimmon.terminal.console import printable
from persimmon.terminal.dialogue import Dialogue, Reply, ReportProgress
from persimmon.terminal.gauge import closing_line
from persimmon.terminal.keyboard import Interrupt, Keyboard, silent_keyboard
from persimmon.terminal.view import AnswerView, MarkdownView, PlainView


class Session:
    """One person, one terminal, one dialogue."""

    def __init__(self, dialogue: Dialogue, commands: Commands, keyboard: Keyboard, console: Console) -> None:
        self._dialogue = dialogue
        self._commands = commands
        self._keyboard = keyboard
        self._console = console
        self._interrupt = Interrupt()
        self._draft = ""  # a message that was not answered, to be edited

    def greet(self, name: str, facts: list[str], notes: list[str]) -> None:
        """One line about the model, and notes below it."""
        dot = " - " if self._console.options.ascii_only else " · "
        self._console.print(Text.assemble((name, "name"), *((dot + fact, "dim") for fact in facts)))
        for note in notes:
            self._say(note)
        self._console.print()

    def run(self) -> None:
        """Talk until /quit, Ctrl-D, or Ctrl-C twice."""
        placeholder = "Write a message, or /help"
        with self._interrupt:
            while (line := self._read(placeholder)) is not None:
                placeholder = ""
                if line.strip() and not self._handle(line):
                    return

    def _read(self, placeholder: str) -> str | None:
        """The next message or command; None when the person leaves."""
        draft, self._draft = self._draft, ""
        try:
            return self._keyboard.read(draft=draft, placeholder=placeholder)
        except EOFError:
            return None

    def _handle(self, line: str) -> bool:
        """A message or a command; False ends the session. Errors are shown, and the conversation goes on."""
        try:
            if is_command(line):
                if not self._obey(self._commands.run(line)):
                    return False
            elif question := unwrapped(line):
                self._draft = question
                self._ask(lambda: self._dialogue.ask(question))
        except PersimmonError as error:
            self._say_error(str(error))
        except OSError as error:
            self._say_error(f"{error.filename or 'file'}: {error.strerror or error}")
        self._console.print()
        return True

    def _obey(self, outcome: Outcome) -> bool:
        """Show what a command says and do what it asks for; False ends the session."""
        if outcome.text:
            self._say(outcome.text)
        if outcome.rows:
            self._console.print(_table(outcome.rows))
        if outcome.gauge:
            self._say_gauge([])
        if outcome.retry:
            self._ask(self._dialogue.retry)
        return not outcome.quit

    def _ask(self, ask: Callable[[], Reply]) -> None:
        """Answer, or say what can be done when the conversation no longer fits the context."""
        try:
            reply = ask()
        except ContextLengthError as error:
            self._say_error(str(error))
            self._say(self._choices())
        else:
            self._answer(reply)

    def _answer(self, reply: Reply) -> None:
        """Stream one answer, keep what came of it, and close with a line of facts."""
        if reply.dropped:
            self._say(f"Dropped the oldest {_exchanges(reply.dropped)} to make room.")
        self._console.print()
        dumb = self._console.is_dumb_terminal
        view: AnswerView = PlainView(self._console.file) if dumb else MarkdownView(self._console)
        view.wait("...")
        reply.on_reading = _progress_on(view, self._interrupt)
        with silent_keyboard():
            try:
                self._stream(reply, view)
            finally:
                reply.stop()
                view.finish()
                kept = self._dialogue.keep(reply)
        if kept:
            self._draft = ""
            self._console.print()
            self._say_gauge(reply.facts())
        else:
            self._say("Stopped before the answer began." if self._interrupt.requested else "The model had no answer.")

    def _stream(self, reply: Reply, view: AnswerView) -> None:
        """Show the text of an answer until it ends or Ctrl-C ends it."""
        try:
            with self._interrupt.watching():
                for text in reply:
                    view.add(text)
                    if self._interrupt.requested:
                        return
        except KeyboardInterrupt:
            return

    def _choices(self) -> str:
        """What can be done about a full context."""
        dialogue = self._dialogue
        if dialogue.conversation.exchanges and not dialogue.settings.drop_oldest:
            return (
                "/undo takes the last exchange back, /clear starts anew, "
                "/set drop_oldest on lets the oldest exchanges go by themselves."
            )
        return "A shorter message may fit" + (", or /file clear." if dialogue.conversation.files else ".")

    def _say(self, text: str) -> None:
        self._console.print(Text(printable(text), "dim"))

    def _say_error(self, text: str) -> None:
        self._console.print(Text(printable(text), "error"))

    def _say_gauge(self, facts: list[str]) -> None:
        console = self._console
        line = closing_line(facts, self._dialogue.fullness(), console.width - 1, ascii_only=console.options.ascii_only)
        console.print(line)


def _progress_on(view: AnswerView, interrupt: Interrupt) -> ReportProgress:
    """Shows how far a long prompt is read, and lets Ctrl-C stop the reading between two chunks."""

    def report(done: int, total: int) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        if done < total:
            view.wait(f"reading {done:,} of {total:,} tokens ...")

    return report


def _exchanges(count: int) -> str:
    return "exchange" if count == 1 else f"{count} exchanges"


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(printable(name), "accent"), Text(printable(value), "dim"))
    return table
