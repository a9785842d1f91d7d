"""Shows an answer while it comes: rendered Markdown on a terminal, plain text anywhere else."""

from __future__ import annotations

import time
from typing import IO, Protocol

from rich.console import Console, RenderableType
from rich.text import Text

from persimmon.terminal.blocks import BlockSplitter
from persimmon.terminal.console import printable
from persimmon.terminal.markdown import render_markdown
from persimmon.terminal.painter import Painter, Size

_FRAME_SECONDS = 1 / 30
_PAINTING_SHARE = 0.2
"""Share of the time that painting may take from the model: long blocks are painted less often."""


class AnswerView(Protocol):
    """Where the text of one answer goes."""

    def wait(self, note: str) -> None:
        """Say what happens before the first text."""

    def add(self, text: str) -> None:
        """Show more text."""

    def finish(self) -> None:
        """The answer is complete; what follows starts on a new line."""


class PlainView:
    """Text as it is, without control characters; nothing is kept back."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def wait(self, note: str) -> None:
        """Plain text holds nothing but the answer."""

    def add(self, text: str) -> None:
        """Write and flush."""
        self._file.write(printable(text))
        self._file.flush()

    def finish(self) -> None:
        """End the line."""
        self.add("\n")


class MarkdownView:
    """Markdown, block by block: finished blocks are printed for good, the open one is painted over until it is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._splitter = BlockSplitter()
        self._painter = Painter(console.file, lambda: Size(console.size.width, console.size.height))
        self._painted_a_block = False
        self._next_paint = 0.0

    def wait(self, note: str) -> None:
        """A dim line until the first text takes its place."""
        self._painter.paint(self._lines(Text(note, "dim")))

    def add(self, text: str) -> None:
        """Take more text and show it, at most 30 times per second."""
        for block in self._splitter.add(printable(text)):
            self._paint(block)
            self._painter.keep()
            self._painted_a_block = True
        started = time.monotonic()
        if started >= self._next_paint and self._splitter.open.strip():
            self._paint(self._splitter.open)
            spent = time.monotonic() - started
            self._next_paint = started + max(_FRAME_SECONDS, spent / _PAINTING_SHARE)

    def finish(self) -> None:
        """Show all of the text."""
        self._paint(self._splitter.open)
        self._painter.keep()

    def _paint(self, source: str) -> None:
        lines = self._lines(render_markdown(source, ascii_only=self._console.options.ascii_only))
        self._painter.paint(["", *lines] if self._painted_a_block and lines else lines)

    def _lines(self, renderable: RenderableType) -> list[str]:
        """The renderable as lines with colours, one column narrower than the terminal."""
        with self._console.capture() as capture:
            self._console.print(renderable, width=max(1, self._console.width - 1))
        text = capture.get().rstrip("\n")
        return text.split("\n") if text else []
