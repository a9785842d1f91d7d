import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from persimmon.terminal.commands import COMMANDS
from persimmon.terminal.keyboard import CommandCompleter, Interrupt, Keyboard, history_file, open_history

UP, ESCAPE, CTRL_C, CTRL_D = "\x1b[A", "\x1b", "\x03", "\x04"

pytestmark = pytest.mark.timeout(60)  # a prompt that is not left would read for ever


@contextmanager
def typing(keys: str, *history: str) -> Iterator[Keyboard]:
    """A keyboard on which these keys are pressed."""
    remembered = InMemoryHistory()
    for line in history:
        remembered.append_string(line)
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        yield Keyboard(remembered, input=pipe, output=DummyOutput())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("食事\r", "食事"),
        (f"one{ESCAPE}\rtwo\r", "one\ntwo"),
        ('"""one\r\rtwo"""\r', '"""one\n\ntwo"""'),
        ("\x1b[200~pasted\nlines\x1b[201~\r", "pasted\nlines"),
        (f"wrong{CTRL_C}right\r", "right"),
        (f"{CTRL_C}not leaving{CTRL_C}after all\r", "after all"),
        (f"{UP}\r", "before"),
    ],
)
def test_keys(keys: str, message: str) -> None:
    with typing(keys, "before") as keyboard:
        assert keyboard.read() == message


@pytest.mark.parametrize("keys", [CTRL_D, CTRL_C * 2, f"some text{CTRL_C}{CTRL_C}"])
def test_ways_to_leave(keys: str) -> None:
    with typing(keys) as keyboard, pytest.raises(EOFError):
        keyboard.read()


def test_a_draft_can_be_edited() -> None:
    with typing("!\r") as keyboard:
        assert keyboard.read(draft="hello", placeholder="write") == "hello!"


def completions(text: str) -> list[str]:
    found = CommandCompleter().get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "menu.txt").touch()
    assert completions("/") == [command.name for command in COMMANDS]
    assert completions("/s") == ["/system", "/set", "/save"]
    assert completions("/set top") == ["top_p", "top_k"]
    assert completions("/set top_p ") == []
    assert completions(f"/file {tmp_path}/me") == ["nu.txt"]
    assert completions("hello /s") == completions("/help\n/s") == completions("") == []


def test_history_is_kept_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state" / "persimmon" / "chat_history"
    open_history(path).append_string("a secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(open_history(path).load_history_strings()) == ["a secret"]
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "persimmon" / "chat_history"


def test_without_a_place_for_it_history_lives_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    history = open_history(tmp_path / "file" / "chat_history")
    assert isinstance(history, InMemoryHistory)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_while_watched_the_first_interrupt_asks_and_the_second_stops() -> None:
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.watching():
            press_ctrl_c()
            assert interrupt.requested
            press_ctrl_c()
        with interrupt.watching():
            assert not interrupt.requested


def test_at_other_times_interrupts_do_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        for _ in range(3):
            press_ctrl_c()
        with interrupt.watching():
            assert not interrupt.requested
    assert signal.getsignal(signal.SIGINT) is before
