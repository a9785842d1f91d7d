"""Redraws the growing end of an answer in place, and only the lines that changed.

A block is painted again and again as a list of lines. Lines that scrolled off the top are beyond reach and stay as they
were printed, so a block taller than the screen scrolls like any other output. Nothing is erased before it is
overwritten, and each paint is one write, so nothing flickers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import IO, NamedTuple

from rich.cells import cell_len

_ERASE_RIGHT, _ERASE_BELOW = "\x1b[K", "\x1b[J"
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
"""Terminals that know this pair show what is between them at once; others ignore it."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Size(NamedTuple):
    """Columns and rows of a terminal."""

    width: int
    height: int


class Painter:
    """Paints blocks of lines at the bottom of a terminal; between paints the cursor is behind the last line."""

    def __init__(self, file: IO[str], size: Callable[[], Size]) -> None:
        self._file = file
        self._size = size
        self._lines: list[str] = []
        self._painted_at = size()

    def paint(self, lines: list[str]) -> None:
        """Replace the open block; `lines` hold no newline and are narrower than the terminal."""
        size = self._size()
        if not self._lines:
            self._painted_at = size
        if lines != self._lines or size.width != self._painted_at.width:
            move, first = self._move(lines, size)
            body = f"{_ERASE_RIGHT}\n".join(lines[first:])
            self._write(f"{_BEGIN_FRAME}{move}{body}{_ERASE_BELOW}{_END_FRAME}")
        # Rows that a taller terminal gains above the block may belong to other output: never count on them.
        self._painted_at = Size(size.width, min(size.height, self._painted_at.height))
        self._lines = list(lines)

    def keep(self) -> None:
        """The block is final; the next one starts on a new line."""
        if self._lines:
            self._write("\n")
        self._lines = []

    def _move(self, lines: list[str], size: Size) -> tuple[str, int]:
        """How to reach the first line that has to be written, and its index."""
        old, height = self._lines, min(size.height, self._painted_at.height)
        if size.width != self._painted_at.width:
            # The terminal has wrapped the old lines anew. All lines are written again, from the top of what is still
            # in reach: what scrolled off appears twice, but nothing is lost.
            rows = sum(max(1, math.ceil(cell_len(_COLOUR.sub("", line)) / size.width)) for line in old)
            return _up(min(rows, height) - 1), 0
        same = next((i for i, (a, b) in enumerate(zip(old, lines, strict=False)) if a != b), min(len(old), len(lines)))
        in_reach = max(0, len(old) - height)
        first = max(same, in_reach)
        if first >= len(lines):  # only taking lines away: write the last one that stays, to stop behind it
            first = max(len(lines) - 1, 0)
        if first == len(old) > 0:
            return "\n", first
        return _up(len(old) - 1 - first), first

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _up(rows: int) -> str:
    """To the start of the line `rows` above."""
    return f"\x1b[{rows}A\r" if rows > 0 else "\r"
