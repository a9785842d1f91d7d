"""The chat format: golden texts, the template, ids, loss masks, refusals."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fixtures_tokenizer import exact_tokenizer, hard_text, release_like_tokenizer
from persimmon import chat
from persimmon.errors import InputError
from persimmon.tokenizer import END_OF_TEXT, Tokenizer

BOTH = pytest.mark.parametrize("make", [exact_tokenizer, release_like_tokenizer], ids=["exact", "release-like"])


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ONE = [message("user", "Simply put, the theory of relativity states that?")]
THREE = [message("user", " Hi\n"), message("assistant", "\tHello there. "), message("user", "And now?")]
SYSTEM = [message("system", " Be brief.\n"), *THREE]


@st.composite
def conversations(draw: st.DrawFn, *, answered: bool | None = None) -> list[dict[str, Any]]:
    """Valid messages; `answered`: whether the last one is an answer."""
    contents = draw(st.lists(hard_text, min_size=1, max_size=6))
    if answered is not None and len(contents) % 2 == answered:
        contents.append("end")
    messages = [message(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    system = [message("system", draw(hard_text))] if draw(st.booleans()) else []
    return system + messages


# -- text ----------------------------------------------------------------------------------------------------


def test_one_turn() -> None:
    assert chat.render(ONE) == "human: Simply put, the theory of relativity states that?\n\nadept:"


def test_several_turns() -> None:
    assert chat.render(THREE) == "human: Hi\n\nadept: Hello there.\n\nhuman: And now?\n\nadept:"
    assert chat.render(THREE, add_generation_prompt=False) == "human: Hi\n\nadept: Hello there.\n\nhuman: And now?"
    assert chat.render(THREE[:2], add_generation_prompt=False) == "human: Hi\n\nadept: Hello there."


def test_system_text_stands_at_the_head_of_the_first_turn() -> None:
    assert chat.render(SYSTEM) == ("human: Be brief.\n\nHi\n\nadept: Hello there.\n\nhuman: And now?\n\nadept:")
    assert chat.render([message("system", "  "), *ONE]) == chat.render(ONE)


def test_an_empty_content_leaves_the_bare_marker() -> None:
    messages = [message("user", " "), message("assistant", ""), message("user", "x")]
    assert chat.render(messages) == "human:\n\nadept:\n\nhuman: x\n\nadept:"


def test_stop_string_is_the_next_turn() -> None:
    assert chat.STOP_STRINGS == ("\n\nhuman:",)


# -- template ------------------------------------------------------------------------------------------------


@functools.cache
def template(trimming: bool) -> Template:
    def raise_exception(text: str) -> None:
        raise ValueError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=trimming, lstrip_blocks=trimming)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat.CHAT_TEMPLATE)


def render_template(messages: list[dict[str, Any]], trimming: bool, **values: Any) -> str:
    return template(trimming).render(messages=messages, **values)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), trimming=st.booleans())
def test_the_template_renders_the_same_bytes(messages: list[dict[str, Any]], trimming: bool) -> None:
    prompt = messages[-1]["role"] == "user"
    text = chat.render(messages, add_generation_prompt=prompt)
    assert render_template(messages, trimming, add_generation_prompt=prompt) == text
    assert render_template(messages, trimming, add_generation_prompt=prompt, bos_token="[end]") == "[end]" + text


# -- refusals ------------------------------------------------------------------------------------------------

WRONG = [
    ([], "messages must not be empty"),
    ([message("system", "x")], "system message only"),
    ([message("assistant", "x")], "message 0: expected the role 'user', got 'assistant'"),
    ([*ONE, *ONE], "message 1: expected the role 'assistant', got 'user'"),
    ([*ONE, message("system", "x")], "message 1: expected the role 'assistant', got 'system'"),
    ([message("system", "x"), message("system", "y"), *ONE], "message 1: expected the role 'user', got 'system'"),
    ([message("system", "x"), message("assistant", "y")], "message 1: expected the role 'user', got 'assistant'"),
    ([*THREE, message("tool", "x")], "message 3: unknown role 'tool'; known: system, user, assistant"),
    (THREE[:2], "message 1: the last message must be the user's"),
]


@pytest.mark.parametrize(("messages", "text"), WRONG)
def test_wrong_conversations_are_refused(messages: list[dict[str, Any]], text: str) -> None:
    for call in (chat.render, lambda m: chat.encode(exact_tokenizer(), m)):
        with pytest.raises(InputError, match=text):
            call(messages)
    with pytest.raises(ValueError, match="message"):
        render_template(messages, True, add_generation_prompt=True)


@pytest.mark.parametrize("content", [None, 3, ["x"], [{"type": "text", "text": "x"}]])
def test_content_must_be_a_string(content: Any) -> None:
    with pytest.raises(InputError, match="message 0: content must be a string, got"):
        chat.render([{"role": "user", "content": content}])
    with pytest.raises(InputError, match="unknown role None"):
        chat.render([{"content": "x"}])


# -- ids -----------------------------------------------------------------------------------------------------


@BOTH
def test_one_end_of_text_stands_in_front_and_none_between(make: Any) -> None:
    ids = chat.encode(make(), [message("user", END_OF_TEXT), *THREE[1:]])
    assert ids[0] == make().bos_id
    assert ids.count(make().bos_id) == 1
    assert make().decode(ids) == f"human: {END_OF_TEXT}\n\nadept: Hello there.\n\nhuman: And now?\n\nadept:"


@BOTH
@settings(max_examples=100, deadline=None)
@given(messages=conversations(answered=False))
def test_ids_spell_the_rendered_text(make: Any, messages: list[dict[str, Any]]) -> None:
    text = chat.render(messages)
    if not make().exact:
        text = text.replace("\u2581", " ")
    assert make().decode(chat.encode(make(), messages)) == text


@settings(max_examples=100, deadline=None)
@given(messages=conversations(answered=False))
def test_segments_give_the_ids_of_the_whole_text(messages: list[dict[str, Any]]) -> None:
    tokenizer = exact_tokenizer()
    assert chat.encode(tokenizer, messages) == tokenizer.encode(chat.render(messages), bos=True)


@BOTH
@settings(max_examples=100, deadline=None)
@given(messages=conversations(answered=True))
def test_training_begins_with_the_prompt_of_every_turn(make: Any, messages: list[dict[str, Any]]) -> None:
    ids, _ = chat.encode_for_training(make(), messages)
    for end in range(1, len(messages) + 1):
        if messages[end - 1]["role"] == "user":
            prompt = chat.encode(make(), messages[:end])
            assert ids[: len(prompt)] == prompt


# -- loss mask -----------------------------------------------------------------------------------------------


def trained_texts(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[str]:
    """The text of every run of tokens that the loss counts, end-of-text by its name."""
    ids, mask = chat.encode_for_training(tokenizer, messages)
    assert len(ids) == len(mask)
    runs: list[bytes] = []
    previous = False
    for token_id, counts in zip(ids, mask, strict=True):
        if counts:
            runs += [] if previous else [b""]
            runs[-1] += END_OF_TEXT.encode() if token_id == tokenizer.eos_id else tokenizer.piece_bytes(token_id)
        previous = counts
    return [run.decode() for run in runs]


@BOTH
def test_loss_counts_for_answers_and_their_ends(make: Any) -> None:
    one = [*ONE, message("assistant", "Time bends.")]
    assert trained_texts(make(), one) == [f" Time bends.{END_OF_TEXT}"]
    two = [*SYSTEM, message("assistant", "Later.")]
    assert trained_texts(make(), two) == [" Hello there.\n\nhuman:", f" Later.{END_OF_TEXT}"]


@settings(max_examples=100, deadline=None)
@given(messages=conversations(answered=True))
def test_every_answer_ends_in_something_that_stops(messages: list[dict[str, Any]]) -> None:
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    expected = [(f" {answer}" if answer else "") + chat.STOP_STRINGS[0] for answer in answers]
    expected[-1] = expected[-1].removesuffix(chat.STOP_STRINGS[0]) + END_OF_TEXT
    assert trained_texts(exact_tokenizer(), messages) == expected


def test_training_needs_an_answer_at_the_end() -> None:
    for messages in ([], ONE, THREE):
        with pytest.raises(InputError, match="must end with an assistant message"):
            chat.encode_for_training(exact_tokenizer(), messages)
