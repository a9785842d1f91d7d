"""The front of the command line: help, version, suggestions, errors and exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from persimmon import engines
from persimmon.cli import main as front
from persimmon.cli.main import OTHER_TOOLS_FLAGS, OTHER_TOOLS_VERBS, VERBS, main
from persimmon.errors import InputError, NotFoundError, UnavailableError


def fake_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Let `doctor` be a verb that raises `error`, or takes --width and returns it."""

    def add_arguments(parser: object) -> None:
        parser.add_argument("--width", type=int, default=0)

    def run(args: object) -> int:
        if error is not None:
            raise error
        return args.width

    verb = SimpleNamespace(HELP="a verb", add_arguments=add_arguments, run=run)
    monkeypatch.setattr(front, "verb_module", lambda name: verb)


# -- help and version ---------------------------------------------------------------------------------------


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for verb, module in VERBS.items():
        assert f"  {verb} " in page and importlib.import_module(module).HELP in page
    assert max(map(len, page.splitlines())) <= 100


def test_nothing_at_all_shows_the_help_as_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "usage: persimmon VERB" in said.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_every_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: persimmon {verb}" in capsys.readouterr().out

    def check(parser: object) -> None:
        for action in parser._actions:
            nested = getattr(action, "_name_parser_map", None)
            assert nested or action.help, f"{verb} {action.option_strings or action.dest} has no help"
            for inner in (nested or {}).values():
                check(inner)

    check(front.verb_parser(verb))


def test_version_names_package_torch_and_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["persimmon", "torch", "engines"]
    assert "reference" in lines[2]
    missing = engines.missing_engines()
    assert lines[3:] == [f"missing {name} ({reason})" for name, reason in missing.items()]


def test_version_says_why_an_engine_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbuilt = dataclasses.replace(engines.ENGINES["cpu"], why_unavailable=lambda: "not built; install it again")
    monkeypatch.setitem(engines.ENGINES, "cpu", unbuilt)
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("engines reference") and lines[3] == "missing cpu (not built; install it again)"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"], ["generate", "--help"]])
def test_the_front_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from persimmon.cli.main import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'sentencepiece', 'rich', 'prompt_toolkit', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- suggestions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("download", "import"), ("convert", "import"), ("run", "chat"), ("ls", "info"), ("show", "info"),
     ("generat", "generate"), ("prunevocab", "prune-vocab"), ("downlaod", "import")],
)  # fmt: skip
def test_an_unknown_verb_suggests_one(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed, "--flag", "value"]) == 2
    said = capsys.readouterr().err
    assert f"unknown verb {typed!r}; did you mean 'persimmon {meant}'?" in said


def test_nothing_close_to_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "unknown verb 'xyzzy'; persimmon --help lists them" in capsys.readouterr().err


def test_suggestions_exist() -> None:
    assert set(OTHER_TOOLS_VERBS.values()) <= set(VERBS) and not set(OTHER_TOOLS_VERBS) & set(VERBS)
    flags = front.verb_parser("generate")._option_string_actions
    assert {meant for meant in OTHER_TOOLS_FLAGS.values() if meant.startswith("--")} <= set(flags)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--max-new-tokens", "--max-tokens"), ("--max_tokens=5", "--max-tokens"), ("--temprature", "--temperature"),
     ("--max-model-len", "--context"), ("--model", "MODEL")],
)  # fmt: skip
def test_an_unknown_flag_suggests_one(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", typed, "5"]) == 2
    said = capsys.readouterr().err
    assert f"persimmon: error: unknown argument {typed.partition('=')[0]}; did you mean {meant}" in said


def test_flags_have_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--temp", "1", "--prompt", "a"]) == 2
    assert "did you mean --temperature" in capsys.readouterr().err


def test_a_wrong_value_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--max-tokens", "many"]) == 2
    assert "persimmon: error: argument --max-tokens: invalid int value: 'many'" in capsys.readouterr().err


# -- errors and exit codes ----------------------------------------------------------------------------------


def test_a_verbs_own_code_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_verb(monkeypatch)
    assert [main(["doctor", "--width", str(code)]) for code in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("temperature must be less"), 2, "persimmon: error: temperature must be less"),
        (NotFoundError("no model 'x'"), 2, "persimmon: error: no model 'x'"),
        (UnavailableError("no such engine"), 1, "persimmon: error: no such engine"),
        (OSError(28, "No space left", "out"), 1, "persimmon: error: [Errno 28] No space left: 'out'"),
        (KeyError("x"), 1, "persimmon: error: 'x' (KeyError; --debug shows where)"),
        (KeyboardInterrupt(), 130, "persimmon: interrupted"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(monkeypatch, error)
    assert main(["doctor"]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.strip() == line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_verb(monkeypatch, InputError("bad"))
    for words in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(InputError):
            main(words)


@pytest.mark.skipif(os.name != "posix", reason="pipes of other systems break differently")
def test_a_closed_pipe_is_no_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "persimmon.cli.main", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_console_script_is_main() -> None:
    script = Path(sys.executable).with_name("persimmon")
    if not script.exists():
        pytest.skip("the package is not installed as a command")
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("persimmon ")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-"])
def test_closed_streams_are_no_errors(redirection: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m persimmon.cli.main info test --json {redirection}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and "Error" not in result.stderr
