"""Stop strings in a stream of text: found as soon as they are complete, never leaked in part.

The stop that is complete first wins; of several that end at the same character, the longest. What is found does
not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string appears; holds back an end that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def add(self, text: str) -> str:
        """Take more text; returns what is now known not to belong to a stop string. Nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = first_stop(text, self._stops)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return text[:start]
        keep = len(text) - self._longest_partial_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text has ended: what was held back belongs to it."""
        held, self._held = self._held, ""
        return held

    def _longest_partial_stop(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop) of the stop string in `text` that is complete first, the longest of those that end together."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None
