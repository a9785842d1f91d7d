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


class TimedProgress:
    """Questions done and the time left: a line that is redrawn on a terminal, one line every half minute elsewhere."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self._label, self._quiet = label, quiet
        self._terminal = sys.stderr.isatty()
        self._start: tuple[float, int] | None = None
        self._said = 0.0

    def __enter__(self) -> TimedProgress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Report; the rate counts from the first call, so that resumed questions do not."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
            self._said = now if not self._terminal else 0.0
        if self._quiet or (done < total and now - self._said < (0.1 if self._terminal else 30.0)):
            return
        self._said = now
        began, before = self._start
        left = (now - began) / (done - before) * (total - done) if done > before else None
        times = f"{_clock(now - began)} gone" + ("" if left is None or done == total else f", {_clock(left)} left")
        text = f"{self._label}: {done}/{total} questions, {times}"
        sys.stderr.write(f"\r\x1b[2K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._terminal and not self._quiet and self._start is not None:
            sys.stderr.write("\n")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
