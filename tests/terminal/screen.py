"""A terminal small enough to trust: what a person sees after some output, and what scrolled away."""

from __future__ import annotations

import re

from rich.cells import cell_len

_TOKEN = re.compile(r"\x1b\[(\?)?([0-9;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Screen:
    """Rows of text of a terminal; knows the control sequences that the painter uses, and refuses others."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.scrolled: list[str] = []
        self.rows = [""]
        self._row = self._column = 0

    def write(self, text: str) -> int:
        position = 0
        for token in _TOKEN.finditer(text):
            assert token.start() == position, f"unknown control sequence in {text[position:]!r}"
            position = token.end()
            self._take(token)
        assert position == len(text)
        return len(text)

    def flush(self) -> None:
        pass

    @property
    def text(self) -> list[str]:
        """All rows from the first to the last, without trailing blanks."""
        return [row.rstrip() for row in self.scrolled + self.rows]

    def _take(self, token: re.Match[str]) -> None:
        match token[3]:
            case "A":
                (self._row,) = (max(0, self._row - int(token[2] or 1)),)
            case "K":
                self._cut_row()
            case "J":
                self._cut_row()
                del self.rows[self._row + 1 :]
            case "m" | "h" | "l":
                pass
            case None:
                self._print(token[0])
            case other:
                raise AssertionError(f"unknown control sequence {other}")

    def _print(self, text: str) -> None:
        if text == "\r":
            self._column = 0
        elif text == "\n":
            self._column = 0
            self._row += 1
            if self._row == len(self.rows):
                self.rows.append("")
            if len(self.rows) > self.height:
                self.scrolled.append(self.rows.pop(0))
                self._row -= 1
        else:
            row = self.rows[self._row].ljust(self._column)
            self.rows[self._row] = row[: self._column] + text + row[self._column + len(text) :]
            self._column += len(text)
            assert cell_len(self.rows[self._row].rstrip()) < self.width, "a row must end before the last column"

    def _cut_row(self) -> None:
        self.rows[self._row] = self.rows[self._row][: self._column]
