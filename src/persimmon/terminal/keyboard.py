"""Reads messages and commands from a terminal: several lines, history, completion, and what Ctrl-C means when."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from persimmon.terminal.commands import COMMANDS, is_open_block
from persimmon.terminal.console import ACCENT
from persimmon.terminal.settings import SETTINGS

_PATH_COMMANDS = {"/file", "/load", "/save"}
_MENU_ROWS = 6
_STYLE = Style.from_dict(
    {
        "prompt": f"{ACCENT} bold",
        "placeholder": "ansibrightblack",
        "rprompt": "ansibrightblack",
        "completion-menu": "noinherit",
        "completion-menu.completion": "noinherit",
        "completion-menu.completion.current": f"noinherit {ACCENT} bold",
        "scrollbar.background": "noinherit",
        "scrollbar.button": "noinherit",
        "completion-menu.meta.completion": "noinherit ansibrightblack",
        "completion-menu.meta.completion.current": "noinherit ansibrightblack",
    }
)


class CommandCompleter(Completer):
    """Completes commands, the names of settings and paths."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Candidates for the text before the cursor."""
        text = document.text_before_cursor
        word, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            yield from _matching(word, {command.name: command.meaning for command in COMMANDS})
        elif word == "/set" and " " not in argument:
            yield from _matching(argument, {name: entry.metadata["meaning"] for name, entry in SETTINGS.items()})
        elif word in _PATH_COMMANDS:
            yield from self._paths.get_completions(Document(argument), complete_event)


def _matching(start: str, meanings: dict[str, str]) -> Iterator[Completion]:
    for name, meaning in meanings.items():
        if name.startswith(start):
            yield Completion(name, start_position=-len(start), display_meta=meaning)


def history_file() -> Path:
    """Where messages are remembered: $XDG_STATE_HOME/persimmon/chat_history."""
    state = os.environ.get("XDG_STATE_HOME", "")
    home = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return home / "persimmon" / "chat_history"


def open_history(path: Path) -> History:
    """The history in `path`, readable by its owner only; one in memory where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


class Keyboard:
    """The prompt. `read` returns a message or command, or raises EOFError when the person wants to leave."""

    def __init__(self, history: History, *, ascii_only: bool = False, **session: Any) -> None:
        """`session` goes to prompt_toolkit (tests pass input and output)."""
        self._mark = "> " if ascii_only else "❯ "
        self._leaving = False  # Ctrl-C was pressed on an empty line
        self._session: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            completer=CommandCompleter(),
            complete_while_typing=Condition(self._typing_command),
            reserve_space_for_menu=_MENU_ROWS,
            prompt_continuation=lambda width, *_: " " * width,
            rprompt=lambda: FormattedText([("class:rprompt", "Ctrl-C again leaves" if self._leaving else "")]),
            key_bindings=self._bindings(),
            style=_STYLE,
            enable_open_in_editor=True,
            enable_suspend=True,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            **session,
        )
        self._session.default_buffer.on_text_changed += self._stay

    def read(self, *, draft: str = "", placeholder: str = "") -> str:
        """One message; `draft` is there to be edited, `placeholder` shows while the line is empty."""
        self._leaving = False
        return self._session.prompt(
            [("class:prompt", self._mark)],
            default=draft,
            placeholder=FormattedText([("class:placeholder", placeholder)]),
        )

    def _stay(self, _: object) -> None:
        self._leaving = False

    def _typing_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add("enter")
        def _(event: KeyPressEvent) -> None:
            """Take the chosen completion, go on inside triple quotes, or send."""
            buffer = event.current_buffer
            if buffer.complete_state and buffer.complete_state.current_completion:
                buffer.complete_state = None
            elif is_open_block(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            """A new line."""
            event.current_buffer.newline(copy_margin=False)

        @bindings.add("c-c")
        def _(event: KeyPressEvent) -> None:
            """Clear the line; leave when it is empty and this is the second time."""
            if event.current_buffer.text:
                event.current_buffer.reset()
            elif self._leaving:
                event.app.exit(exception=EOFError)
                return
            self._leaving = True

        return bindings


class Interrupt:
    """Ctrl-C outside the prompt: it never ends the program.

    While an answer is watched, the first one asks to stop and the second one stops at once. Asking leaves the model
    between two tokens. At any other time it does nothing, for instance when it comes just after an answer has ended.
    """

    def __init__(self) -> None:
        self.requested = False
        self._watching = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of Ctrl-C from here on; the second one raises KeyboardInterrupt."""
        self.requested, self._watching = False, True
        try:
            yield
        finally:
            self._watching = False

    def _handle(self, _: int, frame: FrameType | None) -> None:
        if not self._watching:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Keys typed meanwhile are not echoed into the answer; they wait for the next prompt."""
    try:
        import termios
    except ImportError:  # no POSIX terminal
        termios = None  # type: ignore[assignment]
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
