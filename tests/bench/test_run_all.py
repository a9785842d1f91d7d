"""The script that measures every row: its commands are ones the program knows, and it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from persimmon.cli.main import verb_parser

ROOT = Path(__file__).parents[2]
EVERYTHING = [
    "--models", "MODELS", "--llama-bench", "llama-bench", "--gguf", "full.gguf", "--gguf-4-layers", "four.gguf",
    "--data", "DATA",
]  # fmt: skip


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_all", ROOT / "benchmarks" / "run_all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_all"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arguments(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["run_all.py", *words])
    return script.parse()


def test_every_command_is_understood(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(script.rows(arguments(script, monkeypatch, *EVERYTHING)))
    assert len({row.name for row in rows}) == len(rows) >= 17
    for row in rows:
        if row.command[1].endswith("evaluation.py"):
            assert Path(row.command[1]).is_file()
            continue
        assert row.command[1:4] == ["-m", "persimmon.cli.main", "bench"]
        args = verb_parser("bench").parse_all([*row.command[4:], "--out", "file.json"])
        if getattr(args, "against", None) and args.against != "transformers":
            words = shlex.split(args.against)
            if words[1:4] == ["-m", "persimmon.cli.main", "bench"]:
                verb_parser("bench").parse_all(words[4:])
    known = {model.name for model in script.MODELS}
    assert {name for row in rows for name in row.needs} <= known


def test_rows_whose_peer_is_missing_are_left_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [row.name for row in script.rows(arguments(script, monkeypatch, "--models", "MODELS"))]
    assert "kernels" in names and not any(name.endswith("-llama") or name.startswith("eval") for name in names)


def test_a_row_that_takes_too_long_ends_with_all_it_started(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    program = "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
    program += f"pathlib.Path({str(child)!r}).write_text(str(child.pid)); time.sleep(600)"
    monkeypatch.setattr(script, "ROW_SECONDS", 5)
    assert not script.measure(script.Row("a", [sys.executable, "-c", program]), tmp_path / "a.json")
    started = int(child.read_text())
    until = time.monotonic() + 30  # a killed process may take a moment to be gone
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_rows_that_are_there_are_passed_over(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two of three rows are missing; one of them fails, and the other is measured all the same."""
    measured = tmp_path / "measured"
    program = f"import sys, pathlib; pathlib.Path({str(measured)!r}).open('a').write(sys.argv[1]); "
    program += "sys.exit(3) if sys.argv[1] == 'b' else pathlib.Path(sys.argv[3]).write_text('{}')"
    made = [script.Row(name, [sys.executable, "-c", program, name]) for name in "abc"]
    monkeypatch.setattr(script, "rows", lambda args: iter(made))
    (tmp_path / "a.json").write_text("{}")
    arguments(script, monkeypatch, "--models", str(tmp_path), "--out", str(tmp_path))
    assert script.main() == 1
    assert measured.read_text() == "bc" and (tmp_path / "c.json").is_file()
    assert "failed: b" in capfd.readouterr().out
