"""The serve verb up to the point where a server runs; tests/serve has the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from persimmon.cli.main import main

SERVER = "persimmon.serve.server"


def test_a_missing_package_is_one_line_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, SERVER, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    said = capsys.readouterr()
    assert said.err == "persimmon: error: serving needs uvicorn: pip install 'persimmon[serve]'\n" and said.out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-public-without-key"),
        (["--api-key", "short"], "at least 8"),
        (["--api-key-file", "none.txt"], "none.txt does not exist"),
        (["--max-concurrency", "0"], "max_concurrency"),
    ],
)
def test_unsafe_and_impossible_settings_are_refused(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERSIMMON_API_KEY", raising=False)
    assert main(["serve", *flags]) == 2
    assert words in capsys.readouterr().err
