"""An interactive chat with a scripted model: what the terminal test runs in a terminal of its own.

The answer repeats the message; `slowly` in it gives a word every 50 ms for minutes, `long` a hundred lines, `show` the
Markdown file of the first argument.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from persimmon.terminal.commands import Commands
from persimmon.terminal.console import make_console
from persimmon.terminal.dialogue import Dialogue
from persimmon.terminal.keyboard import Keyboard, history_file, open_history
from persimmon.terminal.session import Session
from persimmon.terminal.settings import Settings
from terminal.scripted_model import ScriptedModel


def answer(messages: list[dict[str, str]]) -> list[str]:
    """The pieces of the answer to the last message."""
    question = messages[-1]["content"]
    if "slowly" in question:
        return [f" {number}" for number in range(5000)]
    if "long" in question:
        return [f"line {number}\n" for number in range(100)]
    if "show" in question:
        return re.findall(r"\s*\S+|\s+$", Path(sys.argv[1]).read_text())
    return re.findall(r"\s*\S+", f" You said {question}")


def main() -> None:
    delay = 0.02
    dialogue = Dialogue(ScriptedModel(answer, delay=delay), Settings(max_tokens=4000))
    console = make_console()
    keyboard = Keyboard(open_history(history_file()), ascii_only=console.options.ascii_only)
    session = Session(dialogue, Commands(dialogue, "scripted"), keyboard, console)
    session.greet("scripted", ["no parameters", "context of 16,384 tokens"], [])
    session.run()


if __name__ == "__main__":
    main()
