"""What lines that start with a slash do to a dialogue. Nothing here reads or draws; an `Outcome` says what to show."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from persimmon.errors import InputError
from persimmon.terminal import storage
from persimmon.terminal.attachments import read_text_file
from persimmon.terminal.dialogue import Dialogue
from persimmon.terminal.settings import SETTINGS, find_setting


class Command(NamedTuple):
    """A row of `/help`."""

    name: str
    argument: str
    meaning: str


COMMANDS = (
    Command("/help", "", "this list"),
    Command("/system", "[TEXT|clear]", "show or set the text that stands before the conversation"),
    Command("/file", "[PATH|clear]", "put a text file with the next message; list or remove them"),
    Command("/retry", "", "another answer to the last message"),
    Command("/undo", "", "take the last message and its answer back"),
    Command("/context", "", "how full the context is, and with what"),
    Command("/set", "[NAME VALUE]", "show or change how answers are picked"),
    Command("/save", "[PATH]", "write the conversation to a JSON file"),
    Command("/load", "PATH", "go on with a saved conversation"),
    Command("/clear", "", "start anew"),
    Command("/quit", "", "leave (also /bye, Ctrl-D)"),
)
ALIASES = {"/bye": "/quit", "/exit": "/quit", "/?": "/help"}
KEYS = (
    ("Ctrl-C", "stops an answer; at the prompt it clears the line, and leaves when pressed twice"),
    ("Alt-Enter", "a new line in the message (also Esc, then Enter)"),
    ('"""', "a message of several lines, up to the next one"),
    ("Ctrl-X Ctrl-E", "write the message in $EDITOR"),
)

TRIPLE = '"""'
_COMMAND = re.compile(r"/(?:\?|[a-z]+)(?=\s|$)", re.IGNORECASE)
_SHOWN_QUESTION = 60


@dataclass
class Outcome:
    """What a command wants: something shown, an answer, or the end."""

    text: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)
    """A table of two columns."""
    gauge: bool = False
    retry: bool = False
    quit: bool = False


def is_command(line: str) -> bool:
    """A slash and a word. `/usr/bin` is none, and a space before the slash makes any line a message."""
    return _COMMAND.match(line) is not None


class Commands:
    """Runs commands on one dialogue."""

    def __init__(self, dialogue: Dialogue, model_name: str) -> None:
        self._dialogue = dialogue
        self._model_name = model_name
        self._path: Path | None = None  # of the last /save or /load
        self._actions: dict[str, Callable[[str], Outcome]] = {
            "/help": self._help,
            "/system": self._system,
            "/file": self._file,
            "/retry": self._retry,
            "/undo": self._undo,
            "/context": self._context,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/quit": lambda _: Outcome(quit=True),
        }

    def run(self, line: str) -> Outcome:
        """Execute one line; a wrong command or argument is a PersimmonError."""
        word, *rest = line.split(maxsplit=1)
        name = ALIASES.get(word.lower(), word.lower())
        if name not in self._actions:
            close = difflib.get_close_matches(name, self._actions, n=1)
            hint = f"did you mean {close[0]}?" if close else "/help lists them"
            raise InputError(f"no command {word}; {hint} (a space in front sends it as a message)")
        return self._actions[name]("".join(rest).strip())

    def _help(self, _: str) -> Outcome:
        rows = [(f"{name} {argument}".strip(), meaning) for name, argument, meaning in COMMANDS]
        return Outcome(rows=[*rows, ("", ""), *KEYS])

    def _system(self, text: str) -> Outcome:
        conversation = self._dialogue.conversation
        if text:
            conversation.system = "" if text == "clear" else unwrapped(text)
            state = "is set" if conversation.system else "is gone"
            return Outcome(f"The system text {state}; it counts from the next answer on.")
        return Outcome(conversation.system or "There is no system text.")

    def _file(self, argument: str) -> Outcome:
        conversation, count = self._dialogue.conversation, self._dialogue.count_text
        if argument == "clear":
            conversation.files.clear()
            return Outcome("No file goes with the next message.")
        if argument:
            file = read_text_file(_unquoted(argument))
            verb = "Replaced" if self._dialogue.attach(file) else "Attached"
            tokens = count(file.fenced())
            return Outcome(f"{verb} {file.name}, {tokens:,} tokens; it goes with the next message.", gauge=True)
        if not conversation.files:
            return Outcome("No file goes with the next message; /file PATH attaches one.")
        return Outcome(rows=[(file.name, f"{count(file.fenced()):,} tokens") for file in conversation.files])

    def _retry(self, _: str) -> Outcome:
        same = self._dialogue.settings.temperature == 0
        return Outcome("At temperature 0 the answer stays the same." if same else "", retry=True)

    def _undo(self, _: str) -> Outcome:
        exchange = self._dialogue.conversation.undo()
        if exchange is None:
            raise InputError("there is nothing to take back")
        question = " ".join(exchange.question.split())
        shown = question if len(question) <= _SHOWN_QUESTION else question[: _SHOWN_QUESTION - 3] + "..."
        files = (
            f" ({', '.join(file.name for file in exchange.files)} goes with the next message again)"
            if exchange.files
            else ""
        )
        return Outcome(f"Took back: {shown}{files}", gauge=True)

    def _context(self, _: str) -> Outcome:
        dialogue, count = self._dialogue, self._dialogue.count_text
        conversation, fullness = dialogue.conversation, dialogue.fullness()
        system = count(conversation.system)
        files = sum(count(file.fenced()) for file in conversation.files)
        number = len(conversation.exchanges)
        parts = [
            ("system text", system),
            (f"{number} exchange{'' if number == 1 else 's'}", max(0, fullness.used - system - files)),
            ("waiting files", files),
            ("free", max(0, fullness.total - fullness.used)),
        ]
        return Outcome(rows=[(name, f"{tokens:,} tokens") for name, tokens in parts], gauge=True)

    def _set(self, argument: str) -> Outcome:
        settings = self._dialogue.settings
        if not argument:
            width = max(len(settings.shown(name)) for name in SETTINGS) + 2
            meanings = {name: entry.metadata["meaning"] for name, entry in SETTINGS.items()}
            return Outcome(rows=[(name, f"{settings.shown(name):<{width}}{meanings[name]}") for name in SETTINGS])
        name, _, value = argument.replace("=", " ", 1).partition(" ")
        entry = find_setting(name)
        if value.strip():
            self._dialogue.settings = settings = settings.changed(name, value)
        return Outcome(f"{entry.name} is {settings.shown(entry.name)}.")

    def _save(self, argument: str) -> Outcome:
        path = Path(_unquoted(argument)).expanduser() if argument else self._path
        if path is None:
            raise InputError("/save needs a path the first time")
        saved = storage.Saved(self._dialogue.conversation, self._dialogue.settings, self._model_name)
        storage.save(path, saved)
        self._path = path
        return Outcome(f"Saved to {path}.")

    def _load(self, argument: str) -> Outcome:
        if not argument:
            raise InputError("/load needs the path of a saved conversation")
        path = Path(_unquoted(argument)).expanduser()
        saved = storage.load(path)
        self._dialogue.open(saved.conversation, saved.settings)
        self._path = path
        number = len(saved.conversation.exchanges)
        other = f" It was held with {saved.model}." if saved.model != self._model_name else ""
        return Outcome(f"Loaded {number} exchange{'' if number == 1 else 's'} from {path}.{other}", gauge=True)

    def _clear(self, _: str) -> Outcome:
        self._dialogue.conversation.clear()
        kept = "; the system text stays" if self._dialogue.conversation.system else ""
        return Outcome(f"A new conversation{kept}.")


def unwrapped(text: str) -> str:
    """A message without the triple quotes around several lines."""
    stripped = text.strip()
    if is_open_block(stripped):
        return stripped.removeprefix(TRIPLE).strip("\n")
    if stripped.startswith(TRIPLE) and len(stripped) >= 2 * len(TRIPLE):
        return stripped.removeprefix(TRIPLE).removesuffix(TRIPLE).strip("\n")
    return stripped


def is_open_block(text: str) -> bool:
    """Whether text began a block in triple quotes that has not ended yet."""
    stripped = text.strip()
    return stripped.startswith(TRIPLE) and not (len(stripped) >= 2 * len(TRIPLE) and stripped.endswith(TRIPLE))


def _unquoted(argument: str) -> str:
    """A path as typed, without the quotes around one with spaces."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        return argument[1:-1]
    return argument
