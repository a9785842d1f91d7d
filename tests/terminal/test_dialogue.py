import pytest

from persimmon.errors import ContextLengthError, InputError
from persimmon.terminal.attachments import TextFile
from persimmon.terminal.conversation import Exchange
from persimmon.terminal.dialogue import Dialogue, Reply
from persimmon.terminal.settings import Settings
from terminal.scripted_model import ScriptedModel, echo


def dialogue(*, context: int = 16_384, system: str = "", **settings: object) -> Dialogue:
    return Dialogue(ScriptedModel(echo, context=context), Settings(**settings), system)


def model_of(talk: Dialogue) -> ScriptedModel:
    assert isinstance(talk.model, ScriptedModel)
    return talk.model


def say(talk: Dialogue, question: str) -> Reply:
    reply = talk.ask(question)
    "".join(reply)
    assert talk.keep(reply)
    return reply


def test_a_conversation_grows_turn_by_turn() -> None:
    talk = dialogue(system="Be kind.", temperature=0.5)
    say(talk, "one")
    say(talk, "two")
    messages, sampling = model_of(talk).requests[-1]
    assert messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"},
    ]
    assert sampling["temperature"] == 0.5
    assert talk.conversation.exchanges[-1].answer == "You said: two"


def test_space_around_an_answer_is_no_part_of_it() -> None:
    talk = Dialogue(ScriptedModel(lambda _: ["", " ", "\n", " Yes", ". \n"]), Settings())
    reply = talk.ask("?")
    assert "".join(reply) == "Yes. \n"
    assert reply.text == "Yes."


def test_facts_say_how_an_answer_ended() -> None:
    assert say(dialogue(), "a").facts() == ["3 tokens", "50 tokens/s"]
    assert say(dialogue(max_tokens=1), "a").facts() == ["max_tokens reached", "1 token", "50 tokens/s"]
    talk = dialogue()
    reply = talk.ask("a b c")
    next(iter(reply))
    reply.stop()
    assert reply.facts()[0] == "stopped"


def test_a_stopped_answer_keeps_its_text() -> None:
    talk = dialogue()
    reply = talk.ask("a b c")
    for _ in reply:
        if reply.text == "You said:":
            break
    reply.stop()
    assert talk.keep(reply)
    assert talk.conversation.exchanges == [Exchange("a b c", (), "You said:")]


def test_without_text_nothing_is_kept() -> None:
    talk = dialogue()
    talk.attach(TextFile("a.txt", "x"))
    reply = talk.ask("a")
    reply.stop()
    assert not talk.keep(reply)
    assert not talk.conversation.exchanges
    assert [file.name for file in talk.conversation.files] == ["a.txt"]


def test_files_go_with_the_next_question_only() -> None:
    talk = dialogue()
    talk.attach(TextFile("menu.txt", "soup"))
    say(talk, "What is there?")
    say(talk, "Thanks")
    first, second = (messages for messages, _ in model_of(talk).requests)
    assert first[-1]["content"] == "menu.txt:\n```\nsoup\n```\n\nWhat is there?"
    assert second[0] == first[0]
    assert second[-1]["content"] == "Thanks"


def test_retry_replaces_the_answer_and_changes_the_seed() -> None:
    talk = dialogue(seed=5)
    talk.attach(TextFile("menu.txt", "soup"))
    say(talk, "a")
    talk.attach(TextFile("later.txt", "x"))
    for _ in range(2):
        reply = talk.retry()
        "".join(reply)
        assert talk.keep(reply)
    requests = model_of(talk).requests
    assert requests[1][0] == requests[0][0]
    assert [sampling["seed"] for _, sampling in requests] == [5, 6, 7]
    assert len(talk.conversation.exchanges) == 1
    assert [file.name for file in talk.conversation.files] == ["later.txt"]
    say(talk, "b")
    assert requests[-1][1]["seed"] == 5


def test_a_retry_without_text_leaves_the_old_answer() -> None:
    talk = dialogue()
    say(talk, "a")
    before = list(talk.conversation.exchanges)
    reply = talk.retry()
    reply.stop()
    assert not talk.keep(reply)
    assert talk.conversation.exchanges == before


def test_retry_needs_a_question() -> None:
    with pytest.raises(InputError, match="no question"):
        dialogue().retry()


def test_a_question_that_does_not_fit_changes_nothing() -> None:
    talk = dialogue(context=400)
    say(talk, "a")
    before = talk.count()
    with pytest.raises(ContextLengthError, match=r"the conversation needs \d+ tokens; the context has 400, .* 64 are"):
        talk.ask("x" * 300)
    assert talk.count() == before
    with pytest.raises(ContextLengthError):
        dialogue(context=400).ask("x" * 400)
    assert talk.model.requests[1:] == []


def test_a_retry_that_does_not_fit_leaves_the_old_answer() -> None:
    talk = dialogue(context=400)
    talk.conversation.exchanges = [Exchange("x" * 380, (), "y")]
    with pytest.raises(ContextLengthError):
        talk.retry()
    assert talk.conversation.exchanges == [Exchange("x" * 380, (), "y")]


def test_the_oldest_go_only_when_allowed_and_then_a_quarter_gets_free() -> None:
    talk = dialogue(context=1000, drop_oldest=True)
    talk.conversation.exchanges = [Exchange(f"{n}" + "x" * 140, (), "y") for n in range(6)]
    reply = talk.ask("new")
    assert reply.dropped == 2
    assert [exchange.question[0] for exchange in talk.conversation.exchanges] == ["2", "3", "4", "5"]
    assert talk.count(reply.exchange) <= 1000 - 64 - 250
    assert say(talk, "next").dropped == 0


def test_dropping_everything_for_nothing_drops_nothing() -> None:
    talk = dialogue(context=400, drop_oldest=True)
    say(talk, "a")
    with pytest.raises(ContextLengthError, match="the question alone needs"):
        talk.ask("x" * 400)
    assert len(talk.conversation.exchanges) == 1


def test_files_are_held_against_the_context() -> None:
    talk = dialogue(context=400)
    say(talk, "a")
    talk.attach(TextFile("a.txt", "x" * 150))
    with pytest.raises(ContextLengthError, match=r"b\.txt has 215 tokens, but only \d+ of 400 are free"):
        talk.attach(TextFile("b.txt", "x" * 200))
    assert talk.attach(TextFile("a.txt", "x" * 200))  # takes the place of the first one
    assert [len(file.text) for file in talk.conversation.files] == [200]


def test_fullness_counts_what_the_model_will_read() -> None:
    talk = dialogue()
    assert talk.fullness().used == 0
    talk.conversation.system = "Hi"
    assert talk.fullness().used == 2
    talk.attach(TextFile("a", "x"))
    assert talk.fullness().used == 2 + len("a:\n```\nx\n```")
    say(talk, "b")
    assert talk.fullness().used == 1 + len("human: Hi\n\na:\n```\nx\n```\n\nb\n\nadept: You said: a: ``` x ``` b")
    assert talk.fullness().total == 16_384


def test_a_tiny_context_still_answers() -> None:
    assert say(dialogue(context=60), "a").text == "You said: a"
