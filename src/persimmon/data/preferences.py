"""Preferences from JSON Lines: a conversation and two answers to it, of which one is better, checked line by line.

| form | record |
|---|---|
| prompt | `{"prompt": "..." or [messages], "chosen": "..." or [answer], "rejected": "..." or [answer]}` |
| messages | `{"messages": [..., {"role": "user", ...}], "chosen": ..., "rejected": ...}` |
| whole conversations | `{"chosen": [messages], "rejected": [messages]}`, equal but for the last answer |

An answer is a string or a list with one message of the assistant's. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from persimmon.chat import Message
from persimmon.data.conversations import check_conversation, check_file
from persimmon.data.documents import OnBad, read_json_lines, stop
from persimmon.errors import DataError, InputError


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in their last answer, and where they came from (`file:line`)."""

    chosen: list[Message]
    rejected: list[Message]
    origin: str


def read_preferences(path: Path, on_bad: OnBad = stop) -> Iterator[Preference]:
    """The preferences of one file, `.jsonl` or `.jsonl.gz`.

    What is wrong with a record, its file and line named, goes to `on_bad`, which raises it by default as DataError.
    Raises NotFoundError.
    """
    check_file(path, "preferences")
    for origin, record in read_json_lines(path, on_bad):
        try:
            chosen, rejected = (_conversation(record, key) for key in ("chosen", "rejected"))
            for key, messages in (("chosen", chosen), ("rejected", rejected)):
                _check(key, messages)
            _compare(chosen, rejected)
        except InputError as error:
            on_bad(DataError(f"{origin}: {error}"))
        else:
            yield Preference(chosen, rejected, origin)


def _conversation(record: dict[str, Any], key: str) -> list[Message]:
    answer = record.get(key)
    if isinstance(answer, str):
        messages: Any = [{"role": "assistant", "content": answer}]
    elif isinstance(answer, list) and answer and all(isinstance(item, dict) for item in answer):
        messages = answer
    else:
        raise DataError(f"`{key}` must be a string or a list of messages, got {type(answer).__name__}")
    return cast(list[Message], [*_prompt(record), *messages])


def _prompt(record: dict[str, Any]) -> list[Any]:
    prompt = record.get("prompt", record.get("messages", []))
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(item, dict) for item in prompt):
        raise DataError(f"the prompt must be a string or a list of messages, got {type(prompt).__name__}")
    return prompt


def _check(key: str, messages: list[Message]) -> None:
    try:
        check_conversation(messages)
    except InputError as error:
        raise DataError(f"`{key}`: {error}") from None


def _compare(chosen: list[Message], rejected: list[Message]) -> None:
    if chosen[:-1] != rejected[:-1]:
        raise DataError("`chosen` and `rejected` must answer the same conversation")
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise DataError("`chosen` and `rejected` are the same answer")
