"""What verbs say beside their data: notes and progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_BAR_WIDTH = 24
_SECONDS_BETWEEN_FRAMES = 0.1


def note(text: str, *, quiet: bool = False) -> None:
    """A line for the person at the terminal."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A warning: said even when quiet."""
    print(f"persimmon: warning: {text}", file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """The one JSON document of a `--json` run."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


class Progress:
    """A bar on stderr, drawn only on a terminal and wiped when done.

    Call it with (done, total), in whatever unit; use it as a context manager so that it is always wiped.
    """

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self._label = label
        self._enabled = not quiet and sys.stderr.isatty()
        self._drawn_at = 0.0
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        """Draw the bar, at most ten times per second."""
        now = time.monotonic()
        if not self._enabled or now - self._drawn_at < _SECONDS_BETWEEN_FRAMES:
            return
        self._drawn_at = now
        share = min(1.0, done / max(1, total))
        filled = round(share * _BAR_WIDTH)
        text = f"{self._label} {'█' * filled}{'░' * (_BAR_WIDTH - filled)} {share:4.0%}"
        self._width = len(text)
        sys.stderr.write(f"\r{text}")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
