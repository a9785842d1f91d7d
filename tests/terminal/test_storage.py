import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.errors import InputError, NotFoundError
from persimmon.terminal.attachments import TextFile
from persimmon.terminal.conversation import Conversation, Exchange
from persimmon.terminal.settings import Settings
from persimmon.terminal.storage import Saved, load, save

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def saved(*exchanges: Exchange, system: str = "") -> Saved:
    return Saved(Conversation(system, list(exchanges)), Settings(temperature=0.5, seed=3), "mini")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4), TEXT)
def test_what_is_saved_loads_again(tmp_path: Path, turns: list[tuple[str, str]], system: str) -> None:
    before = saved(*(Exchange(question, (), answer) for question, answer in turns), system=system)
    assert load(save(tmp_path / "talk.json", before)) == before


def test_the_document(tmp_path: Path) -> None:
    exchange = Exchange("Which soup?", (TextFile("menu.txt", "leek"),), "Leek.")
    path = save(tmp_path / "talk.json", saved(exchange, system="Be brief."))
    document = json.loads(path.read_text())
    assert document == {
        "format": "persimmon-conversation",
        "version": 1,
        "model": "mini",
        "system": "Be brief.",
        "settings": {
            "temperature": 0.5, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "max_tokens": 1024, "seed": 3, "drop_oldest": False,
        },
        "messages": [
            {"role": "user", "content": "menu.txt:\n```\nleek\n```\n\nWhich soup?"},
            {"role": "assistant", "content": "Leek."},
        ],
    }  # fmt: skip


def test_the_example_in_the_docs_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    (tmp_path / "talk.json").write_text(page.split("```json\n")[1].split("```")[0])
    example = load(tmp_path / "talk.json")
    assert example.settings == Settings()
    assert example.conversation.exchanges == [Exchange("Hello", (), "Hello! How can I help?")]


def test_only_saved_conversations_are_replaced(tmp_path: Path) -> None:
    path = save(tmp_path / "talk.json", saved())
    save(path, saved(Exchange("a", (), "b")))
    assert len(load(path).conversation.exchanges) == 1
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a saved conversation"):
        save(tmp_path / "thesis.txt", saved())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError):
        save(tmp_path, saved())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "talk.json", saved())
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, saved(Exchange("a", (), "b")))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_a_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no directory"):
        save(tmp_path / "nowhere" / "talk.json", saved())


def changed(**changes: Any) -> dict[str, Any]:
    document = {
        "format": "persimmon-conversation", "version": 1, "model": "mini", "system": "", "settings": {}, "messages": [],
    }  # fmt: skip
    return document | changes


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "is not a saved conversation"),
        (changed(format="other"), "is not a saved conversation"),
        (changed(version=2), "version 2 is unknown; this program reads 1"),
        (changed(colour=1), "missing or unknown keys: colour"),
        (changed(system=1), "system must be text, got 1"),
        (changed(model=None), "model must be text"),
        (changed(messages={}), "messages must be a list"),
        (changed(messages=["a"]), "message 0 must have role and content"),
        (changed(messages=[USER, USER]), "message 1 must be of role assistant, got 'user'"),
        (changed(messages=[ASSISTANT, USER]), "message 0 must be of role user"),
        (changed(messages=[USER]), "the last message has no answer"),
        (changed(messages=[USER, ASSISTANT | {"content": 1}]), "content of message 1 must be text"),
        (changed(messages=[USER | {"content": "\ud800"}, ASSISTANT]), "lone surrogate at character 0"),
        (changed(settings={"temperature": -1}), "temperature must be"),
        (changed(settings={"heat": 1}), "no setting 'heat'"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, document: Any, says: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=says):
        load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match="is not a saved conversation"):
        load(tmp_path / "f")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        load(tmp_path / "missing.json")
