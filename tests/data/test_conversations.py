"""Conversations from files: four forms, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from persimmon.data.conversations import read_conversations
from persimmon.errors import DataError, NotFoundError

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_messages(tmp_path: Path) -> None:
    records = [{"messages": PAIR, "source": "made", "license": "CC0"}, {"messages": [*PAIR, *PAIR]}]
    for name in ("chat.jsonl", "chat.jsonl.gz"):
        found = list(read_conversations(write(tmp_path / name, records)))
        assert [c.messages for c in found] == [PAIR, [*PAIR, *PAIR]]
        assert [c.origin for c in found] == [f"{name}:1", f"{name}:2"]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"},
                               {"from": "gpt", "value": "Hello"}]},
            [{"role": "system", "content": "Be kind."}, *PAIR],
        ),
        ({"instruction": "Hi", "output": "Hello"}, PAIR),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, PAIR),
        ({"instruction": "Add.", "input": "1 2", "output": "3"},
         [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"prompt": "Hi", "completion": "Hello"}, PAIR),
    ],
)  # fmt: skip
def test_other_forms(record: dict[str, Any], messages: list[dict[str, str]], tmp_path: Path) -> None:
    (conversation,) = read_conversations(write(tmp_path / "chat.jsonl", [record]))
    assert conversation.messages == messages


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "x"}, "none of the keys messages, conversations, instruction, prompt is there"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": "x"}, "`messages` must be a list of objects"),
        ({"messages": ["x"]}, "`messages` must be a list of objects"),
        ({"messages": PAIR[:1]}, "message 0: the last message must be the assistant's"),
        ({"messages": PAIR[1:]}, "message 0: expected the role 'user', got 'assistant'"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " "}]}, "message 1: the answer is empty"),
        ({"messages": [PAIR[0], {"role": "bot", "content": "x"}]}, "message 1: unknown role 'bot'"),
        ({"messages": [PAIR[0], {"role": "assistant"}]}, "message 1: content must be a string, got NoneType"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": "\ud800"}]}, "lone surrogate"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "robot", "value": "y"}]}, "unknown role 'robot'"),
        ({"instruction": "x"}, "`output` must be a string, got NoneType"),
        ({"instruction": "x", "input": 3, "output": "y"}, "`input` must be a string, got int"),
        ({"prompt": "x", "completion": ["y"]}, "`completion` must be a string, got list"),
        ([1], "expected an object"),
    ],
)
def test_wrong_records_name_file_and_line(record: Any, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [{"messages": PAIR}, record])
    with pytest.raises(DataError, match=text) as caught:
        list(read_conversations(path))
    assert str(caught.value).startswith("chat.jsonl:2: ")


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no conversations at .*chat\.jsonl"):
        list(read_conversations(tmp_path / "chat.jsonl"))
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_conversations(tmp_path / "chat.csv"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
        list(read_conversations(tmp_path / "cut.jsonl.gz"))
