"""Filters: which documents are left out, by rules that know no language. Every rule is off until a recipe sets it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields

from persimmon.errors import ConfigError

_COMPRESSED_CHARACTERS = 65_536  # of a longer text, for the repetition rule
_REPLACEMENT = "\ufffd"  # what decoders write in place of broken bytes


@dataclass(frozen=True)
class FilterRecipe:
    """Limits a document has to keep; its drop is counted under the name of the first limit it breaks."""

    min_characters: int | None = None
    max_characters: int | None = None
    max_line_characters: int | None = None
    """Longest line: minified code and data tables have very long ones."""
    max_repeated_lines: float | None = None
    """Share of the non-empty lines that repeat an earlier line."""
    max_symbols: float | None = None
    """Share of the characters that are neither letters, digits nor white space."""
    max_replacements: float | None = None
    """Share of U+FFFD, the mark of text read in the wrong encoding."""
    max_compression: float | None = None
    """Bytes by bytes after DEFLATE: endless repetition compresses far better than prose (2 to 4)."""
    include: tuple[str, ...] = ()
    """Regular expressions of which one must be found."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of which none may be found."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value >= 0:
                raise ConfigError(f"{field.name} must be at least 0, got {value}")
        for expression in (*self.include, *self.exclude):
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"{expression!r} is not a regular expression ({error})") from None

    def refusal(self, text: str) -> str | None:
        """Name of the first limit that `text` breaks, or None."""
        for name, measure in _MEASURES.items():
            limit = getattr(self, name)
            if limit is not None and (measure(text) < limit if name.startswith("min_") else measure(text) > limit):
                return name
        if self.include and not any(re.search(expression, text) for expression in self.include):
            return "include"
        return "exclude" if any(re.search(expression, text) for expression in self.exclude) else None


def _repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _symbols(text: str) -> float:
    return sum(1 for character in text if not (character.isalnum() or character.isspace())) / max(1, len(text))


def _compression(text: str) -> float:
    raw = text[:_COMPRESSED_CHARACTERS].encode()
    return len(raw) / max(1, len(zlib.compress(raw, 6)))


_MEASURES: dict[str, Callable[[str], float]] = {
    "min_characters": len,
    "max_characters": len,
    "max_line_characters": lambda text: max(map(len, text.split("\n"))),
    "max_repeated_lines": _repeated_lines,
    "max_symbols": _symbols,
    "max_replacements": lambda text: text.count(_REPLACEMENT) / max(1, len(text)),
    "max_compression": _compression,
}
