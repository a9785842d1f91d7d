"""The dim line under an answer: tokens, speed, and how full the context is."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

_BAR_CELLS = 12
_NEARLY_FULL = 0.75
_FULL = 0.9


@dataclass(frozen=True)
class Fullness:
    """Tokens in use of a context."""

    used: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.used / self.total)

    @property
    def style(self) -> str:
        """Name of the style that fits: it warns before the context is full."""
        return "full" if self.share >= _FULL else "nearly-full" if self.share >= _NEARLY_FULL else "accent"


def bar(fullness: Fullness, *, ascii_only: bool = False, cells: int = _BAR_CELLS) -> Text:
    """A bar of `cells` columns; any use at all fills one."""
    filled = min(cells, max(round(fullness.share * cells), 1 if fullness.used else 0))
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble((done * filled, fullness.style), (rest * (cells - filled), "faint"))


def closing_line(facts: list[str], fullness: Fullness, width: int, *, ascii_only: bool = False) -> Text:
    """`facts`, most important first, then the gauge; the first form that fits in `width` columns.

    Left out, in this order, on narrow terminals: the bar, a word, facts from the last to the first.
    """
    numbers = f"{fullness.used:,} of {fullness.total:,}"
    drawn = Text.assemble(bar(fullness, ascii_only=ascii_only), (f" {numbers} tokens", "dim"))
    words, short = Text(f"{numbers} tokens", "dim"), Text(numbers, "dim")
    forms = [(facts, drawn), (facts, words), *((facts[:count], short) for count in range(len(facts), -1, -1))]
    dot = " - " if ascii_only else " · "
    for kept, gauge in forms:
        line = Text.assemble(*((fact + dot, "dim") for fact in kept), gauge)
        if line.cell_len <= width:
            return line
    return Text(f"{fullness.share:.0%}", "dim")
