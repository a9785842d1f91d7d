import io

import pytest

from persimmon.errors import ContextLengthError, InputError
from persimmon.terminal.dialogue import Dialogue, Reply
from persimmon.terminal.pipe import BUILT_IN_QUESTION, answer, answer_lines, text_lines
from persimmon.terminal.settings import Settings
from persimmon.terminal.view import PlainView
from terminal.scripted_model import ScriptedModel, echo


def talk(*, context: int = 16_384, drop_oldest: bool = False) -> Dialogue:
    return Dialogue(ScriptedModel(echo, context=context), Settings(drop_oldest=drop_oldest))


def test_every_line_is_a_turn_of_one_conversation() -> None:
    dialogue, file = talk(), io.StringIO()
    reports: list[Reply] = []
    answer_lines(dialogue, ["one\n", "\n", "  /help two\r\n"], file, reports.append)
    assert file.getvalue() == "You said: one\n\nYou said: /help two\n"
    assert [exchange.question for exchange in dialogue.conversation.exchanges] == ["one", "/help two"]
    assert [reply.text for reply in reports] == ["You said: one", "You said: /help two"]


@pytest.mark.parametrize("lines", [[], ["\n", "  \n"]])
def test_nothing_to_answer_gets_the_built_in_question(lines: list[str]) -> None:
    file = io.StringIO()
    answer_lines(talk(), lines, file, lambda reply: None)
    assert file.getvalue() == f"> {BUILT_IN_QUESTION}\n\nYou said: {BUILT_IN_QUESTION}\n"


def test_no_control_characters_come_out() -> None:
    file = io.StringIO()
    dialogue = Dialogue(ScriptedModel(lambda _: [" \x1b[31mred\x1b[0m", "\x07\t!\x9b1m\r\n", "ok"]), Settings())
    answer(dialogue, "?", PlainView(file))
    assert file.getvalue() == "[31mred[0m\t!1m\nok\n"


def test_text_goes_out_as_it_comes() -> None:
    class Recorder(io.StringIO):
        flushed: list[str] = []  # noqa: RUF012

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    file = Recorder()
    answer(talk(), "a", PlainView(file))
    assert file.flushed == ["You", "You said:", "You said: a", "You said: a\n"]


def test_a_full_context_names_the_way_out() -> None:
    dialogue = talk(context=200)
    with pytest.raises(ContextLengthError, match=r"the context has 200, .*; --drop-oldest lets the oldest turns go"):
        answer_lines(dialogue, ["x" * 50] * 9, io.StringIO(), lambda reply: None)
    with pytest.raises(ContextLengthError) as error:
        answer(talk(context=200), "x" * 200, PlainView(io.StringIO()))
    assert "drop" not in str(error.value)
    answer_lines(talk(context=200, drop_oldest=True), ["x" * 50] * 9, io.StringIO(), lambda reply: None)


def test_input_that_is_no_text_is_named() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match="standard input is not utf-8 text: invalid start byte 0xff"):
        list(text_lines(stream))
    assert list(text_lines(None)) == []
