import io
import os
import signal
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from rich.theme import Theme

from persimmon.terminal.commands import Commands
from persimmon.terminal.console import STYLES
from persimmon.terminal.dialogue import Dialogue
from persimmon.terminal.keyboard import Keyboard
from persimmon.terminal.session import Session
from persimmon.terminal.settings import Settings
from terminal.scripted_model import ScriptedModel, echo

CTRL_D = "\x04"
CLEAR = "\x03"  # Ctrl-C: a message that was not answered stands at the prompt again

pytestmark = pytest.mark.timeout(60)  # a session that is not left would read for ever


def talk(keys: str, dialogue: Dialogue) -> str:
    """Press keys, then Ctrl-D; what a terminal without any abilities then shows."""
    file = io.StringIO()
    console = Console(
        file=file, width=200, theme=Theme(STYLES), highlight=False, force_terminal=True, _environ={"TERM": "dumb"}
    )
    with create_pipe_input() as pipe:
        pipe.send_text(keys + CTRL_D)
        keyboard = Keyboard(InMemoryHistory(), input=pipe, output=DummyOutput())
        Session(dialogue, Commands(dialogue, "mini"), keyboard, console).run()
    return file.getvalue()


@pytest.fixture
def dialogue() -> Dialogue:
    return Dialogue(ScriptedModel(echo), Settings())


def test_a_message_is_answered_and_closed_by_facts(dialogue: Dialogue) -> None:
    shown = talk("hello\r", dialogue)
    assert shown.startswith("\nYou said: hello\n\n3 tokens · 50 tokens/s · ━─────────── 37 of 16,384 tokens\n\n")
    assert len(dialogue.conversation.exchanges) == 1


def test_empty_lines_are_nothing(dialogue: Dialogue) -> None:
    assert talk('\r  \r""""""\r', dialogue).strip() == ""
    assert not dialogue.conversation.exchanges


def test_commands_show_and_act(dialogue: Dialogue, tmp_path: Path) -> None:
    (tmp_path / "menu.txt").write_text("soup")
    shown = talk(
        f"/file {tmp_path / 'menu.txt'}\rwhat is there?\r/retry\r/undo\r/nonsense\r/quit\rnot read\r", dialogue
    )
    assert "Attached menu.txt" in shown
    assert shown.count("You said: menu.txt: ``` soup ``` what is there?") == 2
    assert "Took back: what is there?" in shown
    assert "no command /nonsense" in shown
    assert "not read" not in shown
    assert dialogue.conversation.exchanges == []


def test_errors_do_not_end_the_session(dialogue: Dialogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "talk.json")

    monkeypatch.setattr(os, "replace", refuse)
    shown = talk(f"/load {tmp_path / 'none'}\r/save {tmp_path / 'talk.json'}\rhello\r", dialogue)
    assert "no file" in shown
    assert "talk.json: Permission denied" in shown.replace("\n", "")  # lines break anywhere
    assert "You said: hello" in shown


def test_a_full_context_leaves_the_message_to_be_edited() -> None:
    dialogue = Dialogue(ScriptedModel(echo, context=300), Settings())
    long = "x" * 260
    shown = talk(f"hello\r{long}\r!\r{CLEAR}", dialogue)
    assert "the conversation needs" in shown
    assert "/undo takes the last exchange back, /clear starts anew, /set drop_oldest on" in shown
    assert shown.count("the conversation needs") == 2  # the message stood at the prompt again, and was sent with a "!"
    assert len(dialogue.conversation.exchanges) == 1
    shown = talk(f"{long}\r{CLEAR}", Dialogue(ScriptedModel(echo, context=300), Settings()))
    assert "A shorter message may fit." in shown


def test_dropped_exchanges_are_mentioned() -> None:
    dialogue = Dialogue(ScriptedModel(echo, context=300), Settings(drop_oldest=True))
    shown = talk("".join(f"{'x' * 40}{n}\r" for n in range(3)), dialogue)
    assert "Dropped the oldest 2 exchanges to make room." in shown


def test_ctrl_c_stops_the_answer_and_keeps_its_text() -> None:
    def two() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return " two"

    dialogue = Dialogue(ScriptedModel(lambda _: [" one", two, " three", " four"]), Settings())
    shown = talk("count\r/context\r", dialogue)
    assert "one two\n\nstopped · 2 tokens" in shown
    assert dialogue.conversation.exchanges[0].answer == "one two"
    assert "1 exchange" in shown


def test_ctrl_c_before_the_answer_gives_the_message_back() -> None:
    def reading() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return "never"

    dialogue = Dialogue(ScriptedModel(lambda _: [reading]), Settings())
    shown = talk(f"count\r{CLEAR}", dialogue)
    assert "Stopped before the answer began." in shown
    assert not dialogue.conversation.exchanges


def test_an_empty_answer_is_said_and_not_kept() -> None:
    dialogue = Dialogue(ScriptedModel(lambda _: [" "]), Settings())
    assert "The model had no answer." in talk(f"hello\r{CLEAR}", dialogue)
    assert not dialogue.conversation.exchanges
