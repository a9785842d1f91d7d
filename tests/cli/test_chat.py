import io
import sys
from pathlib import Path
from typing import Any

import pytest

from persimmon.cli import chat
from persimmon.cli.main import main
from persimmon.terminal.attachments import TextFile
from persimmon.terminal.dialogue import Dialogue
from persimmon.terminal.pipe import BUILT_IN_QUESTION
from persimmon.terminal.settings import Settings
from terminal.scripted_model import ScriptedModel, echo
from tiny_directory import write_tiny_directory


class Standard(io.TextIOWrapper):
    """A standard stream that may claim to be a terminal."""

    def __init__(self, content: bytes = b"", *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    scripted = ScriptedModel(echo)
    monkeypatch.setattr(chat, "load_from", lambda args: scripted)
    return scripted


def run(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: bytes = b"") -> int:
    monkeypatch.setattr(sys, "stdin", Standard(stdin))
    return main(["chat", *words])


Captured = pytest.CaptureFixture[str]


@pytest.mark.usefixtures("model")
def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run(monkeypatch, stdin="one\nzwölf\n".encode()) == 0
    out, err = capsys.readouterr()
    assert out == "You said: one\n\nYou said: zwölf\n"
    assert err == ""


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("closed", [False, True])
def test_empty_input_gets_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: Captured, closed: bool) -> None:
    monkeypatch.setattr(sys, "stdin", None if closed else Standard())
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == f"> {BUILT_IN_QUESTION}\n\nYou said: {BUILT_IN_QUESTION}\n"


def test_one_message(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    words = ["--prompt", "hi", "--system", "Be kind.", "--temperature", "0", "--seed", "3", "--max-tokens", "2"]
    assert run(monkeypatch, *words, "--verbose", stdin=b"not read") == 0
    out, err = capsys.readouterr()
    assert out == "You said:\n"
    assert err == "max_tokens reached, 2 tokens, 50 tokens/s\n"
    messages, sampling = model.requests[0]
    assert messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert sampling == {
        "temperature": 0.0, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 2,
        "seed": 3,
    }  # fmt: skip


def test_a_message_of_several_lines_from_stdin(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(monkeypatch, "--prompt", "-", stdin=b"two\nlines\n") == 0
    assert model.requests[0][0][-1]["content"] == "two\nlines"
    assert capsys.readouterr().out == "You said: two lines\n"


def test_files_go_with_the_first_message(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name.upper())
    files = ["--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.txt")]
    assert run(monkeypatch, *files, stdin=b"one\ntwo\n") == 0
    first, second = (messages[-1]["content"] for messages, _ in model.requests)
    assert first == "a.txt:\n```\nA.TXT\n```\n\nb.txt:\n```\nB.TXT\n```\n\none"
    assert second == "two"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "-1"], "temperature must be a number from 0 to 100"),
        (["--temperature", "hot"], "--temperature"),
        (["--file", "/no/such/file"], "no file /no/such/file"),
        (["--prompt", " "], "--prompt is empty"),
        (["--max-new-tokens", "3"], "did you mean --max-tokens?"),
    ],
)
@pytest.mark.usefixtures("model")
def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch, capsys: Captured, words: list[str], says: str) -> None:
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


@pytest.mark.parametrize(("flags", "code"), [([], 2), (["--drop-oldest"], 0)])
def test_a_full_context(monkeypatch: pytest.MonkeyPatch, capsys: Captured, flags: list[str], code: int) -> None:
    monkeypatch.setattr(chat, "load_from", lambda args: ScriptedModel(echo, context=200))
    assert run(monkeypatch, *flags, stdin=(b"x" * 50 + b"\n") * 5) == code
    assert ("--drop-oldest" in capsys.readouterr().err) == (code == 2)


@pytest.mark.usefixtures("model")
def test_input_that_is_no_text(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run(monkeypatch, stdin=b"\xff\n") == 2
    assert "standard input is not utf-8 text" in capsys.readouterr().err
    assert run(monkeypatch, "--prompt", "-", stdin=b"\xff\n") == 2


def test_ctrl_c_on_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "load_from", lambda args: ScriptedModel(lambda _: [" one", interrupted]))
    assert run(monkeypatch, stdin=b"count\n") == 130
    assert capsys.readouterr().out == "one\n"


def test_the_interactive_session_opens_only_between_two_terminals(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(chat, "_talk", lambda args, loaded, dialogue: opened.append(loaded))
    for stdin, stdout in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys, "stdin", Standard(terminal=stdin))
        monkeypatch.setattr(sys, "stdout", Standard(terminal=stdout))
        assert main(["chat", "--quiet"]) == 0
    assert opened == [model]


def test_a_real_model_answers_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    directory = write_tiny_directory(tmp_path / "tiny")
    words = [str(directory), "--max-tokens", "20", "--seed", "1", "--threads", "1", "--verbose"]
    assert run(monkeypatch, *words, stdin=b"the story\nof light\n") == 0
    out, err = capsys.readouterr()
    assert out and "\x1b" not in out
    assert err.count("tokens/s") == 2
    assert run(monkeypatch, *words, stdin=b"the story\nof light\n") == 0
    assert capsys.readouterr().out == out


def test_a_licence_that_limits_use_is_shown(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    dialogue = Dialogue(ScriptedModel(echo), Settings())
    assert chat._notes(str(tmp_path), dialogue) == ["Licence CC-BY-NC-4.0: for non-commercial use only."]
    dialogue.attach(TextFile("menu.txt", "soup"))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert chat._notes(str(tmp_path), dialogue) == ["With your first message: menu.txt"]
