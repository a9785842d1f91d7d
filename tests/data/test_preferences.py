"""Preferences from files: three forms, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persimmon.data.preferences import read_preferences
from persimmon.errors import DataError, NotFoundError

USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "assistant", "content": "Go away."},
)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], "chosen": "Hello.", "rejected": [BAD], "source": "made"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["strings", "prompt-messages", "messages", "whole"],
)
def test_forms(tmp_path: Path, record: dict[str, Any]) -> None:
    (found,) = read_preferences(write(tmp_path / "pairs.jsonl", record))
    assert (found.chosen, found.rejected) == ([USER, GOOD], [USER, BAD])
    assert found.origin == "pairs.jsonl:1"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "Hi", "chosen": "Hello."}, "`rejected` must be a string or a list of messages, got NoneType"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "the prompt must be a string or a list of messages, got int"),
        ({"prompt": "Hi", "chosen": "same", "rejected": " same "}, "are the same answer"),
        ({"prompt": "Hi", "chosen": " ", "rejected": "b"}, "`chosen`: message 1: the answer is empty"),
        ({"chosen": "a", "rejected": "b"}, "`chosen`: message 0: expected the role 'user'"),
        ({"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}, "`chosen`: message 2: expected the role 'user'"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, BAD]}, "must answer the same conversation"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, record: dict[str, Any], text: str) -> None:
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"pairs\.jsonl:2") as caught:
        list(read_preferences(write(tmp_path / "pairs.jsonl", good, record)))
    assert text in str(caught.value)


def test_broken_pairs_can_be_left_out(tmp_path: Path) -> None:
    good, bad = {"prompt": "x", "chosen": "y", "rejected": "z"}, {"prompt": "x", "chosen": "y", "rejected": "y"}
    errors: list[DataError] = []
    found = list(read_preferences(write(tmp_path / "pairs.jsonl", bad, good, {}, good), errors.append))
    assert [pair.origin for pair in found] == ["pairs.jsonl:2", "pairs.jsonl:4"]
    assert [str(error).split(": ")[0] for error in errors] == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no preferences at"):
        list(read_preferences(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_preferences(tmp_path / "pairs.csv"))
