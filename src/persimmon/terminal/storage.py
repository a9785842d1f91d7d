"""Saved conversations: one JSON document each.

    {"format": "persimmon-conversation", "version": 1, "model": "mini", "system": "",
     "settings": {"temperature": 0.7, ...}, "messages": [{"role": "user", "content": "..."}, ...]}

`messages` alternate between user and assistant, with files inside the questions they went with.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.atomic import replacing
from persimmon.errors import InputError, NotFoundError, StorageError
from persimmon.terminal.conversation import Conversation, exchanges_of
from persimmon.terminal.settings import Settings

FORMAT = "persimmon-conversation"
VERSION = 1
MAX_BYTES = 64 << 20
"""Far above any context; keeps a wrong file from being read whole."""

_KEYS = {"format", "version", "model", "system", "settings", "messages"}


@dataclass(frozen=True)
class Saved:
    """A conversation and what it was held with."""

    conversation: Conversation
    settings: Settings
    model: str


def save(path: str | Path, saved: Saved) -> Path:
    """Write the conversation; a file that is not a saved conversation is never replaced. Returns the path."""
    path = Path(path).expanduser()
    if path.exists():
        _check_replaceable(path)
    conversation = saved.conversation
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": saved.model,
        "system": conversation.system,
        "settings": dataclasses.asdict(saved.settings),
        "messages": [m for m in conversation.messages() if m["role"] != "system"],
    }
    _write(path, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    return path


def load(path: str | Path) -> Saved:
    """Read and check a saved conversation; every fault is an InputError that names it."""
    path = Path(path).expanduser()
    document = _read(path)
    try:
        if document["version"] != VERSION:
            raise InputError(f"version {document['version']!r} is unknown; this program reads {VERSION}")
        if document.keys() != _KEYS:
            odd = ", ".join(sorted(document.keys() ^ _KEYS))
            raise InputError(f"missing or unknown keys: {odd}")
        system, model = _text(document["system"], "system"), _text(document["model"], "model")
        conversation = Conversation(system, exchanges_of(_checked_messages(document["messages"])))
        return Saved(conversation, Settings.from_json(document["settings"]), model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a saved conversation."""
    if not path.exists():
        raise NotFoundError(f"no file {path}")
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is not a saved conversation")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a saved conversation: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or "version" not in document:
        raise InputError(f"{path} is not a saved conversation")
    return document


def _checked_messages(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise InputError("messages must be a list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise InputError(f"message {index} must have role and content")
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise InputError(f"message {index} must be of role {expected}, got {message['role']!r}")
        _text(message["content"], f"content of message {index}")
    if len(messages) % 2:
        raise InputError("the last message has no answer")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds a lone surrogate at character {error.start}") from None
    return value


def _check_replaceable(path: Path) -> None:
    try:
        _read(path)
    except InputError:
        raise InputError(f"{path} exists and is not a saved conversation; choose another name") from None


def _write(path: Path, text: str) -> None:
    """What was said is its owner's: no one else may read the file."""
    if not path.parent.is_dir():
        raise NotFoundError(f"no directory {path.parent}")
    try:
        with replacing(path, private=True) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
