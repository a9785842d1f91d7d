r"""Messages to a prompt, to token ids, and to training ids with a loss mask: one format for all three.

The format is the release's (README of persimmon-ai-labs/adept-inference):

    human: {first question}\n\nadept: {answer}\n\nhuman: {second question}\n\nadept:

- One space follows each colon, none follows the last one: the model writes it as part of its first piece.
- Every content is stripped of white space at both ends; an empty one leaves the bare marker.
- No system role was trained. Its text stands at the head of the first human turn, a blank line before the question.
- The end-of-text piece stands once at the very front (as the hub tokenizer does) and never between turns. An answer
  ends with it or, inside a longer conversation, with the next `\n\nhuman:`; both stop a generation.

Markers and contents are encoded one by one, for prompts and for training alike. So a training sequence begins with
exactly the ids of the prompt of each of its turns, and the loss mask fits to the piece. For exact vocabularies the
ids are also those of the rendered text as one string, which is what transformers encodes: no piece that
`persimmon tokenizer train` makes reaches across these boundaries.

What this cannot do: markers are plain text. A message that contains `\n\nadept:` or `\n\nhuman:` looks like several
turns to the model; whoever shows it messages of untrusted people must expect that. End-of-text cannot be forged:
its name in a message is text (but not so in transformers, see `tokenizer_files/tokenizer_json.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from persimmon.errors import InputError
from persimmon.tokenizer import Tokenizer
from persimmon.tokenizer_files.chat_template import ASSISTANT, CHAT_TEMPLATE, TURN, USER

__all__ = ["CHAT_TEMPLATE", "STOP_STRINGS", "Message", "encode", "encode_for_training", "render"]

STOP_STRINGS = (TURN + USER,)
"""Where an answer ends when it does not end with end-of-text."""

_ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """What one side said."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Segment(NamedTuple):
    """A marker or a content, and whether the loss counts its tokens."""

    text: str
    trained: bool


def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """The text of a conversation, without end-of-text.

    With `add_generation_prompt` it ends with the marker of the answer to come; the last message is then the user's.
    Raises InputError for an empty list, an unknown role, a content that is no string, or roles in the wrong order.
    """
    return "".join(segment.text for segment in _segments(messages, add_generation_prompt))


def encode(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation: one end-of-text, then the segments of `render`. Raises as `render`."""
    ids, _ = _encode(tokenizer, _segments(messages, add_generation_prompt))
    return ids


def encode_for_training(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    r"""Ids of a whole conversation with end-of-text behind the last answer, and where the loss counts.

    It counts (True) for the tokens of every answer and for what ends it: the closing end-of-text, or `\n\nhuman:`
    where another turn follows. It does not for the opening end-of-text, the questions and `adept:`.
    Raises as `render`, and if the last message is not the assistant's.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise InputError("a conversation for training must end with an assistant message")
    ids, mask = _encode(tokenizer, _segments(messages, add_generation_prompt=False))
    return [*ids, tokenizer.eos_id], [*mask, True]


def _encode(tokenizer: Tokenizer, segments: Iterator[_Segment]) -> tuple[list[int], list[bool]]:
    ids, mask = [tokenizer.bos_id], [False]
    for index, segment in enumerate(segments):
        new = tokenizer.encode(segment.text, continuation=index > 0)
        ids += new
        mask += [segment.trained] * len(new)
    return ids, mask


def _segments(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Iterator[_Segment]:
    turns = _turns(messages)
    if add_generation_prompt and len(turns) % 2 == 0:
        raise InputError(f"message {len(messages) - 1}: the last message must be the user's, it is the assistant's")
    for index, content in enumerate(turns):
        answer = index % 2 == 1
        # A question's marker after an answer is also how that answer ends.
        yield _Segment(TURN * (index > 0) + (ASSISTANT if answer else USER), trained=index > 0 and not answer)
        if content:
            yield _Segment(" " + content, trained=answer)
    if add_generation_prompt:
        yield _Segment(TURN + ASSISTANT, trained=False)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The checked and stripped contents in turn, user first; the system text is part of the first."""
    given: object = messages
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(f"messages must be a list of role and content, got {type(messages).__name__}")
    if not messages:
        raise InputError("messages must not be empty")
    contents = [_content(message, index) for index, message in enumerate(messages)]
    roles = [message["role"] for message in messages]
    system = contents.pop(0) if roles[0] == "system" else None
    first = 0 if system is None else 1
    for index, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise InputError(
                f"message {first + index}: expected the role {expected!r}, got {role!r}; "
                "user and assistant take turns, one system message may come first"
            )
    if not contents:
        raise InputError("messages hold a system message only; a user message must follow it")
    if system:
        contents[0] = TURN.join(part for part in (system, contents[0]) if part)
    return contents


def _content(message: Mapping[str, Any], index: int) -> str:
    if not isinstance(message, Mapping):
        raise InputError(f"message {index}: expected role and content, got {message!r}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise InputError(f"message {index}: unknown role {role!r}; known: {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"message {index}: content must be a string, got {type(content).__name__}")
    return content.strip()
