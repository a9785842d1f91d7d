from __future__ import annotations

import io
import json
import sys

import pytest

from persimmon.cli import console


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_FRAMES", 0)
    with console.Progress("reading") as progress:
        progress(1, 2)
    frame, blank = terminal.getvalue().strip("\r").split("\r")
    assert frame.startswith("reading ") and frame.endswith(" 50%") and "█" in frame
    assert blank == " " * len(frame)


def test_progress_is_silent_when_quiet_and_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Progress("reading") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress("reading", quiet=True) as progress:
        progress(1, 2)
    assert terminal.getvalue() == ""


def test_notes_go_to_stderr_and_json_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("hello")
    console.note("never", quiet=True)
    console.warn("careful")
    console.print_json({"text": "ä"})
    said = capsys.readouterr()
    assert said.err == "hello\npersimmon: warning: careful\n"
    assert json.loads(said.out) == {"text": "ä"} and "ä" in said.out
