"""`persimmon chat`: talk with a model, on a terminal or on a pipe."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from persimmon.cli.options import add_model_options, add_reading_options, load_from, model_name, reading_from

if TYPE_CHECKING:
    from persimmon.api import Persimmon
    from persimmon.terminal.dialogue import Dialogue, Reply

HELP = "talk with a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from persimmon.terminal.settings import SETTINGS

    add_model_options(parser)
    group = parser.add_argument_group("the conversation")
    group.add_argument("--system", default="", metavar="TEXT", help="text that stands before the conversation")
    group.add_argument(
        "--file", dest="files", action="append", default=[], metavar="PATH",
        help="text file that goes with the first message, in a fenced block under its name (repeatable)",
    )  # fmt: skip
    group.add_argument("--prompt", metavar="TEXT", help="answer this one message and leave; - reads it from stdin")
    add_reading_options(group)
    group.add_argument("--drop-oldest", action="store_true", help="let the oldest turns go when the context is full")
    group = parser.add_argument_group("how answers are picked")
    for name, setting in SETTINGS.items():
        kind, meaning = setting.metadata["kind"], setting.metadata["meaning"]
        if kind is not bool:
            unit = "N" if kind is int else "X"
            shown = "" if setting.default is None else f" (default: {setting.default:g})"
            group.add_argument(
                f"--{name.replace('_', '-')}", type=kind, default=setting.default, metavar=unit, help=meaning + shown
            )


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.terminal.attachments import read_text_file
    from persimmon.terminal.dialogue import Dialogue
    from persimmon.terminal.settings import SETTINGS, Settings

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end the chat
    settings = Settings(**{name: getattr(args, name) for name in SETTINGS})
    files = [read_text_file(path) for path in args.files]  # a wrong path shows before the model loads
    reading = reading_from(args)
    question = _question(args.prompt)
    interactive = question is None and _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    model = _load(args, interactive)
    dialogue = Dialogue(model, settings, args.system, **reading)
    for file in files:
        dialogue.attach(file)
    if interactive:
        _talk(args, model, dialogue)
    else:
        _answer_without_terminal(question, dialogue, args.verbose)
    return 0


def _question(prompt: str | None) -> str | None:
    """The message of `--prompt`, None without the flag."""
    from persimmon.errors import InputError
    from persimmon.terminal.pipe import text_lines

    text = "".join(text_lines(sys.stdin)) if prompt == "-" else prompt
    if text is not None and not text.strip():
        raise InputError("--prompt is empty")
    return text.strip() if text else None


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


def _load(args: argparse.Namespace, interactive: bool) -> Persimmon:
    """The model; while a person waits for it, a line says so and goes away again."""
    show = interactive and not args.quiet and _is_terminal(sys.stderr)
    if show:
        print(f"loading {model_name(args)} ...", end="\r", file=sys.stderr, flush=True)
    try:
        return load_from(args)
    finally:
        if show:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def _talk(args: argparse.Namespace, model: Persimmon, dialogue: Dialogue) -> None:
    """The interactive session."""
    from persimmon.terminal.commands import Commands
    from persimmon.terminal.console import make_console
    from persimmon.terminal.keyboard import Keyboard, history_file, open_history
    from persimmon.terminal.session import Session

    console = make_console()
    keyboard = Keyboard(open_history(history_file()), ascii_only=console.options.ascii_only)
    session = Session(dialogue, Commands(dialogue, model_name(args)), keyboard, console)
    session.greet(Path(model_name(args)).name, _facts(model), _notes(model_name(args), dialogue))
    session.run()


def _answer_without_terminal(question: str | None, dialogue: Dialogue, verbose: bool) -> None:
    """One message, or the lines of standard input; Markdown is rendered only where a person sees it."""
    from persimmon.cli.console import note
    from persimmon.terminal.console import make_console
    from persimmon.terminal.pipe import answer, answer_lines, text_lines
    from persimmon.terminal.view import MarkdownView, PlainView

    def report(reply: Reply) -> None:
        note(", ".join(reply.facts()), quiet=not verbose)

    if question is None:
        answer_lines(dialogue, text_lines(sys.stdin), sys.stdout, report)
        return
    console = make_console()
    rendered = console.is_terminal and not console.is_dumb_terminal
    report(answer(dialogue, question, MarkdownView(console) if rendered else PlainView(sys.stdout)))


def _facts(model: Persimmon) -> list[str]:
    """Size, context and engine, for the first line."""
    from persimmon.accounting import count_parameters

    count = count_parameters(model.config).total
    size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    return [f"{size} parameters", f"context of {model.context:,} tokens", f"{model.engine_name} engine"]


def _notes(name: str, dialogue: Dialogue) -> list[str]:
    """A licence that limits what the answers may be used for, and files that wait."""
    from persimmon.checkpoints.download import resolve
    from persimmon.checkpoints.releases import licence_of

    licence = licence_of(resolve(name))
    notes = [f"Licence {licence}: for non-commercial use only."] if licence and "-NC" in licence.upper() else []
    waiting = ", ".join(file.name for file in dialogue.conversation.files)
    return [*notes, f"With your first message: {waiting}"] if waiting else notes
