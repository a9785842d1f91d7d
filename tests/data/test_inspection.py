"""`data inspect`: statistics against plain counting, the plot, damage, and the trained tokens of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures_tokenizer import exact_tokenizer
from made_corpus import made_code, made_text
from persimmon.cli.main import main
from persimmon.data.conversations import Conversation
from persimmon.data.inspection import LONG, inspect, length_statistics, plot, trained_pieces
from persimmon.data.prepare import prepare
from persimmon.data.recipe import DataRecipe
from persimmon.errors import DataError
from persimmon.train.recipe import from_mapping


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name, make in (("text", made_text), ("code", made_code)):
        lines = [json.dumps({"text": make(i, 5 + 9 * i)}) for i in range(12)]
        (root / f"{name}.jsonl").write_text("\n".join([*lines, lines[0]]))
    recipe = {
        "root": str(root),
        "output": str(root / "out"),
        "sources": {"text": {"files": ["text.jsonl"]}, "code": {"files": ["code.jsonl"]}},
        "vocabulary": {"size": 320},
    }
    prepare(from_mapping(DataRecipe, recipe, "test"))
    return root / "out"


@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=50))
def test_length_statistics_count_everything_once(lengths: list[int]) -> None:
    found = length_statistics(np.array(lengths))
    assert sum(bar["documents"] for bar in found["histogram"]) == len(lengths)
    assert sum(bar["tokens"] for bar in found["histogram"]) == sum(lengths)
    for bar in found["histogram"]:
        assert bar["documents"] == sum(bar["from"] <= length < 2 * bar["from"] for length in lengths)
    assert found["longest"] == max(lengths)
    for mark, limit in zip(found["long"], LONG, strict=True):
        long = [length for length in lengths if length >= limit]
        assert mark["documents"] == len(long)
        assert mark["share_of_tokens"] == pytest.approx(sum(long) / sum(lengths))


def test_the_report_and_its_plot(prepared: Path, tmp_path: Path) -> None:
    report = inspect(prepared)
    assert report["verified"] and report["sources"]["text"]["share_of_training"] == 0.75
    text = report["sources"]["text"]
    assert text["read"]["documents"] == 13 and text["dropped"] == {"duplicate": 1}
    assert text["characters"] == text["bytes"] and text["bytes_per_token"] > 1
    plot(report, tmp_path / "plots/data.png")
    assert (tmp_path / "plots/data.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_prints_tables_or_json(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(prepared)]) == 0
    output = capsys.readouterr().out
    assert "dropped: 1 duplicate" in output and "75%" in output
    assert main(["data", "inspect", str(prepared), "--json", "--plot", str(tmp_path / "a.svg")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["sources"]["code"]["lengths"]["histogram"]
    assert (tmp_path / "a.svg").is_file() and "a.svg" in captured.err


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_changed_bit_is_found(prepared: Path, tmp_path: Path, ending: str) -> None:
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / f"text-00000-000{ending}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"SHA-256 is|does not fit"):
        inspect(tmp_path)


CONVERSATION: list[dict[str, str]] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "You are welcome."},
]


def test_trained_tokens_are_the_answers_and_their_ends() -> None:
    pieces = list(trained_pieces(exact_tokenizer(), Conversation(CONVERSATION, "x:1")))  # type: ignore[arg-type]
    trained = [piece.text.strip() for piece in pieces if piece.trained]
    assert len(trained) == 2
    assert trained[0].startswith("It is 4.") and trained[1].startswith("You are welcome.")
    assert all("ENDOFTEXT" in text for text in trained[1:])
    untrained = "".join(piece.text for piece in pieces if not piece.trained)
    assert "What is 2 + 2?" in untrained and "Thanks." in untrained
    assert not any(answer in untrained for answer in ("It is 4", "welcome"))


def test_conversations_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact_tokenizer().save(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    arguments: list[Any] = ["data", "inspect", str(tmp_path / "chat.jsonl"), "--model", str(tmp_path / "model")]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "chat.jsonl:1" in output and "tokens are trained" in output and "«" in output
    assert main([*arguments, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["origin"] == "chat.jsonl:1"
    assert {piece["trained"] for piece in document["pieces"]} == {True, False}
