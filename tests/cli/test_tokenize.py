"""`persimmon tokenize` and `persimmon tokenizer train`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fixtures_tokenizer import exact_tokenizer, made_text
from persimmon.cli.main import main
from persimmon.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocabulary")
    exact_tokenizer().save(path)
    return str(path)


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_table_on_stdout_and_a_summary_on_stderr(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", directory, "--text", "the river\n    é"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["id", "piece"]
    assert rows[1][0].isdigit()
    assert "'\\n▁▁▁▁'" in out
    assert err == f"{len(rows) - 1} tokens for 16 bytes, {16 / (len(rows) - 1):.2f} bytes each\n"


def test_json_is_the_only_thing_on_stdout(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", directory, "--text", "the ☃", "--bos", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    ids = exact_tokenizer().encode("the ☃", bos=True)
    assert found["ids"] == ids
    assert found["pieces"] == [exact_tokenizer().piece(token_id) for token_id in ids]
    assert (found["tokens"], found["bytes"], found["model"]) == (len(ids), 7, directory)
    assert err == ""


@pytest.mark.parametrize("arguments", [[], ["--text", "-"], ["--file", "-"]])
def test_standard_input_is_taken_as_it_is(
    arguments: list[str], directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"a\r\nb\n")
    assert main(["tokenize", f"{directory}/tokenizer.model", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == exact_tokenizer().encode("a\r\nb\n")


def test_a_file_and_the_default_model(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("river")
    monkeypatch.setenv("PERSIMMON_MODEL", directory)
    assert main(["tokenize", "--file", str(tmp_path / "a.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == exact_tokenizer().encode("river")


def test_bad_input_is_one_line(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tokenize", directory, "--file", str(tmp_path / "none.txt")]) == 2
    feed(monkeypatch, b"ab\xff")
    assert main(["tokenize", directory]) == 2
    assert main(["tokenize", str(tmp_path), "--text", "x"]) == 2
    assert main(["tokenize", directory, "--text", "x", "--file", "y"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines[0].endswith("none.txt does not exist")
    assert lines[1] == "persimmon: error: standard input is not UTF-8: byte 2"
    assert "no tokenizer at" in lines[2]
    assert "not allowed with" in lines[3]


def test_train_writes_a_vocabulary_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(made_text(4, 80))
    output = str(tmp_path / "out")
    arguments = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "360", "--output", output]
    assert main([*arguments, "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{output}: 360 pieces (")
    assert "bytes per token" in out
    assert "documents: 1, " in err and "training 360 pieces on" in err
    assert Tokenizer.load(output).vocab_size == 360
    assert main([*arguments, "--quiet", "--json", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["vocab_size"] == 360
    assert err == ""


def test_train_says_which_sizes_are_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(made_text(4, 80))
    arguments = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--vocab-size", "50000"]) == 2
    assert "this text gives at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["tokenizer"]) == 2
