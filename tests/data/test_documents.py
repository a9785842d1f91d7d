"""Reading documents: every kind of file, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.data.documents import Document, find_files, read_documents, read_json_lines
from persimmon.errors import DataError, NotFoundError


def texts_of(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


@given(texts=st.lists(st.text(), max_size=6), ascii_only=st.booleans())
def test_every_text_comes_back(texts: list[str], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("documents")
    lines = "".join(json.dumps({"text": text, "id": 3}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    (directory / "a.jsonl").write_bytes(lines)
    (directory / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    kept = [text for text in texts if text]
    assert texts_of(directory / "a.jsonl") == texts_of(directory / "a.jsonl.gz") == kept


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    content = "one\r\ntwo\n\nthree é\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert list(read_documents(tmp_path / "a.txt")) == [Document(content, "a.txt")]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert texts_of(tmp_path / "empty.txt") == []


def test_origins_count_lines_from_one_and_blank_lines_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n  \n{"text": ""}\n{"text": "y"}')
    assert [document.origin for document in read_documents(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:5"]


def test_separators_inside_a_text_are_no_line_ends(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0cd\re"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl") == [text]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:2: not JSON"),
        (b"text", r"a\.jsonl:2: not JSON"),
        (b'["text"]', r"a\.jsonl:2: expected an object, got list"),
        (b'{"body": "x"}', r"a\.jsonl:2: `text` must be a string, got NoneType"),
        (b'{"text": 3}', r"a\.jsonl:2: `text` must be a string, got int"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(invalid start byte at byte 10\)"),
        (b'{"text": "ab\\ud800"}', r"a\.jsonl:2: `text` holds a lone surrogate at character 2"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: not JSON"),
        (b"[" * 200_000, r"a\.jsonl:2: not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    documents = read_documents(path)
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=message):
        next(documents)


def test_text_files_name_the_line_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8 \(invalid start byte at byte 11\)"):
        texts_of(tmp_path / "a.txt")


def test_damaged_gzip_files_are_named(tmp_path: Path) -> None:
    """Cut anywhere or with any byte changed: an error of the right kind, or (in the header) the same text."""
    lines = b"".join(json.dumps({"text": f"document {i * i}"}).encode() + b"\n" for i in range(40))
    whole = gzip.compress(lines, mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        for content in (whole[:place], bytes(changed)):
            path.write_bytes(content)
            try:
                found = texts_of(path)
            except DataError as error:
                assert str(error).startswith("a.jsonl.gz")
            else:
                assert found == [f"document {i * i}" for i in range(40)] or not content
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged file after line \d+ \(Compressed file ended"):
        texts_of(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.bz2", "a.gz", "a"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(
        DataError, match=rf"{name}: unknown kind of file; expected one of \.jsonl, \.jsonl\.gz, \.jsonl\.zst, \.txt"
    ):
        texts_of(tmp_path / name)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for read in (read_documents, read_json_lines):
        with pytest.raises(NotFoundError, match=r"no file at .*a\.jsonl"):
            list(read(tmp_path / "a.jsonl"))


def test_patterns_add_and_leave_out(tmp_path: Path) -> None:
    for name in ("text/b.jsonl", "text/a.jsonl", "text/bad.jsonl", "code/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    found = find_files(tmp_path, ["text/*.jsonl", "!text/bad*"])
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl"]
    assert len(find_files(tmp_path, ["**/*.jsonl", "text/a.jsonl"])) == 4
    with pytest.raises(NotFoundError, match=r"no file matches .*text/\*\.txt"):
        find_files(tmp_path, ["text/*.txt"])
    for pattern in ("/etc/*", "!/etc/*", "", "!"):
        with pytest.raises(DataError, match="must be a path relative to"):
            find_files(tmp_path, [pattern])
