"""The look of the chat: one accent colour, dim for what is not the conversation, and little else."""

from __future__ import annotations

import re

from rich.console import Console
from rich.theme import Theme

ACCENT = "#ec5800"
"""The colour of the fruit; terminals with fewer colours show the nearest they have."""

STYLES = {
    "name": f"bold {ACCENT}",
    "accent": ACCENT,
    "faint": "dim",
    "nearly-full": "yellow",
    "full": "red",
    "error": "red",
    "heading": "bold",
    "code": "cyan",
    "marker": ACCENT,
    "link": "underline",
}

# All of C0 and C1 but tab and newline: a model or a file can hold escape sequences, and the terminal would obey them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console() -> Console:
    """A console on standard output that takes text literally; NO_COLOR and TERM are honoured by rich."""
    return Console(theme=Theme(STYLES), highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Text without control characters other than tab and newline."""
    return _CONTROL.sub("", text)
