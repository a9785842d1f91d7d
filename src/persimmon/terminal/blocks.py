"""Cuts streamed Markdown into top-level blocks, so that a finished block is drawn once and only the last one again."""

from __future__ import annotations

import functools

from markdown_it import MarkdownIt
from markdown_it.token import Token

# Blocks that a blank line ends. Lists and indented code may go on after one, a fence says itself where it ends.
_ENDED_BY_BLANK_LINE = {"paragraph_open", "heading_open", "blockquote_open", "table_open", "hr"}


@functools.cache
def parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough; HTML and reference definitions stay text, so that nothing vanishes."""
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


class BlockSplitter:
    """Takes text in any pieces; gives each top-level block once it cannot change any more."""

    def __init__(self) -> None:
        self.open = ""
        """The source that is still growing."""

    def add(self, text: str) -> list[str]:
        """Take more text; returns the sources of the blocks that it finished."""
        self.open += text
        if "\n" not in text:
            return []  # only a complete line can end a block
        lines = self.open.split("\n")
        finished, start = [], 0
        for end in _ends_of_finished_blocks(lines[:-1]):
            finished.append("\n".join(lines[start:end]).strip("\n"))
            start = end
        self.open = "\n".join(lines[start:])
        return finished


def _ends_of_finished_blocks(lines: list[str]) -> list[int]:
    """Line numbers where the finished top-level blocks end, blank lines behind them included."""
    tokens = parser().parse("\n".join(lines) + "\n")
    blocks = [token for token in tokens if token.level == 0 and token.nesting >= 0]
    starts = [token.map[0] for token in blocks[1:] if token.map]
    return [*starts, len(lines)] if blocks and _is_over(blocks[-1], len(lines)) else starts


def _is_over(block: Token, num_lines: int) -> bool:
    """Whether nothing that follows can belong to the last block."""
    return block.map is not None and block.map[1] < num_lines and block.type in _ENDED_BY_BLANK_LINE
