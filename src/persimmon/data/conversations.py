"""Conversations from JSON Lines, in the four forms that chat data comes in, checked line by line.

| form | record |
|---|---|
| messages | `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}` |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}` |
| Alpaca | `{"instruction": ..., "input": ... (may be missing or empty), "output": ...}` |
| pairs | `{"prompt": ..., "completion": ...}` |

Other keys (source, licence) are ignored. Every conversation must be one that can be trained on: turns in order, the
last one an answer, no empty answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from persimmon import chat
from persimmon.chat import Message
from persimmon.data.documents import OnBad, read_json_lines, stop
from persimmon.errors import DataError, InputError, NotFoundError

_SUFFIXES = (".jsonl", ".jsonl.gz")

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer, and where they came from (`file:line`)."""

    messages: list[Message]
    origin: str


def read_conversations(path: Path, on_bad: OnBad = stop) -> Iterator[Conversation]:
    """The conversations of one file, `.jsonl` or `.jsonl.gz`.

    What is wrong with a record, its file and line named, goes to `on_bad`, which raises it by default as DataError.
    Raises NotFoundError.
    """
    check_file(path, "conversations")
    for origin, record in read_json_lines(path, on_bad):
        try:
            messages = _messages(record)
            check_conversation(messages)
        except InputError as error:
            on_bad(DataError(f"{origin}: {error}"))
        else:
            yield Conversation(messages, origin)


def _messages(record: dict[str, Any]) -> list[Message]:
    for key, convert in _FORMS.items():
        if key in record:
            return convert(record)
    raise DataError(f"no conversation in it: none of the keys {', '.join(_FORMS)} is there")


def check_file(path: Path, what: str) -> None:
    """Raise DataError or NotFoundError unless it is a file of JSON Lines; `what` it should hold."""
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path.name}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise NotFoundError(f"no {what} at {path}")


def check_conversation(messages: list[Message]) -> None:
    """Raise InputError for whatever the training would refuse, and for answers that teach nothing."""
    text = chat.render(messages, add_generation_prompt=False)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"message {len(messages) - 1}: the last message must be the assistant's")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"message {index}: the answer is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError("the text holds a lone surrogate") from None


def _from_messages(record: dict[str, Any]) -> list[Message]:
    return [_message(item.get("role"), item.get("content")) for item in _objects(record, "messages")]


def _from_sharegpt(record: dict[str, Any]) -> list[Message]:
    items = _objects(record, "conversations")
    return [_message(_SHAREGPT_ROLES.get(str(item.get("from")), item.get("from")), item.get("value")) for item in items]


def _from_alpaca(record: dict[str, Any]) -> list[Message]:
    parts = [_string(record, "instruction"), _string(record, "input") if record.get("input") else ""]
    question = "\n\n".join(part for part in parts if part.strip())
    return [_message("user", question), _message("assistant", _string(record, "output"))]


def _from_pair(record: dict[str, Any]) -> list[Message]:
    return [_message("user", _string(record, "prompt")), _message("assistant", _string(record, "completion"))]


_FORMS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
    "prompt": _from_pair,
}


def _message(role: Any, content: Any) -> Message:
    """Unchecked here: `chat.render` names the message that is wrong."""
    return cast(Message, {"role": role, "content": content})


def _objects(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = record[key]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"`{key}` must be a list of objects")
    return items


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"`{key}` must be a string, got {type(value).__name__}")
    return value
