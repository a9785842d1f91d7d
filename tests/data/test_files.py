"""Every kind of file, compressed or not, here or on the hub; and damage, which is named and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import parquet

from persimmon.data import files
from persimmon.data.documents import read_documents
from persimmon.data.files import CorpusFile, find_corpus_files, local_file
from persimmon.errors import DataError, NotFoundError, UnavailableError

TEXTS = ["one", "two\nlines", "grün ü " * 40]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> None:
    parquet.write_table(pyarrow.table(columns), path, **options)


def texts_of(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


def test_compressed_lines_and_text_and_parquet(tmp_path: Path) -> None:
    compressed = pyarrow.compress(LINES, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(compressed)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS
    (tmp_path / "two.jsonl.zst").write_bytes(compressed * 2)  # frames laid end to end
    assert texts_of(tmp_path / "two.jsonl.zst") == TEXTS * 2
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"Text.\n"))
    (tmp_path / "a.txt.zst").write_bytes(pyarrow.compress(b"Text.\n", codec="zstd", asbytes=True))
    assert texts_of(tmp_path / "a.txt.gz") == texts_of(tmp_path / "a.txt.zst") == ["Text.\n"]
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": TEXTS}, row_group_size=2)
    documents = list(read_documents(tmp_path / "a.parquet"))
    assert [document.text for document in documents] == TEXTS
    assert [document.origin for document in documents] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    write_parquet(tmp_path / "a.parquet", {"content": ["x"]})
    for name in ("a.jsonl", "a.parquet"):
        assert [document.text for document in read_documents(tmp_path / name, "content")] == ["x"]
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'text'; it has content"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz", "a.txt.zst"])
def test_truncated_files_are_named_or_skipped(tmp_path: Path, name: str) -> None:
    many = b"".join(json.dumps({"text": f"document {i * i}"}).encode() + b"\n" for i in range(4000))
    if name.endswith(".parquet"):
        write_parquet(tmp_path / name, {"text": [str(i * i) for i in range(4000)]}, row_group_size=500)
        whole = (tmp_path / name).read_bytes()
    else:
        whole = gzip.compress(many) if name.endswith(".gz") else pyarrow.compress(many, codec="zstd", asbytes=True)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: damaged file".replace(".", r"\.")):
        texts_of(tmp_path / name)
    errors: list[DataError] = []
    found = list(read_documents(tmp_path / name, on_bad=errors.append))
    assert len(errors) == 1
    assert len(found) < 4000


def test_wrong_types_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["x", None, "y"]})
    write_parquet(tmp_path / "b.parquet", {"text": [3, 4]})
    with pytest.raises(DataError, match=r"a\.parquet:2: `text` must be a string, got NoneType"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:1: `text` must be a string, got int"):
        texts_of(tmp_path / "b.parquet")


def test_bad_lines_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{\n{"text": "\xff"}\n[1]\n{"text": 3}\n{"text": "y"}\n')
    errors: list[DataError] = []
    found = [document.text for document in read_documents(tmp_path / "a.jsonl", on_bad=errors.append)]
    assert found == ["x", "y"]
    assert [str(error).split(": ")[0] for error in errors] == [f"a.jsonl:{line}" for line in (2, 3, 4, 5)]


class HubOnDisk(LocalFileSystem):
    """The hub's file system, with a folder in its place."""

    root = ""

    def _strip_protocol(self, path: str) -> str:  # type: ignore[override]
        return path if path.startswith(self.root) else f"{self.root}/{path}"

    def glob(self, path: str, **kwargs: Any) -> list[str]:
        return [str(p.relative_to(self.root)) for p in Path(self.root).glob(path)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    (folder / "datasets/owner/set@v1/data").mkdir(parents=True)
    (folder / "datasets/owner/set@v1/data/b.jsonl.gz").write_bytes(gzip.compress(LINES))
    write_parquet(folder / "datasets/owner/set@v1/data/a.parquet", {"text": TEXTS})
    monkeypatch.setattr(HubOnDisk, "root", str(folder))
    monkeypatch.setattr(files, "_hub", HubOnDisk)
    return folder


def test_files_of_the_hub(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "local.jsonl").write_bytes(LINES)
    found = find_corpus_files(tmp_path, ["local.jsonl", "hf://datasets/owner/set@v1/data/*"])
    assert [file.name for file in found] == [
        "local.jsonl", "datasets/owner/set@v1/data/a.parquet", "datasets/owner/set@v1/data/b.jsonl.gz",
    ]  # fmt: skip
    assert [[document.text for document in read_documents(file)] for file in found] == [TEXTS] * 3
    assert found[2].size == len(gzip.compress(LINES)) and len(found[2].fingerprint()) == 64
    fewer = find_corpus_files(tmp_path, ["hf://datasets/owner/set@v1/data/*", "!hf://datasets/owner/set@v1/data/*.gz"])
    assert [file.name for file in fewer] == ["datasets/owner/set@v1/data/a.parquet"]
    with pytest.raises(NotFoundError, match=r"no file matches hf://datasets/owner/none/\*"):
        find_corpus_files(tmp_path, ["hf://datasets/owner/none/*"])


def test_a_hub_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Offline:
        def glob(self, path: str) -> list[str]:
            raise ConnectionError("no route")

    monkeypatch.setattr(files, "_hub", Offline)
    with pytest.raises(UnavailableError, match=r"hf://datasets/a/b/\* cannot be listed \(ConnectionError: no route\)"):
        find_corpus_files(tmp_path, ["hf://datasets/a/b/*"])


def test_fingerprints_see_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = bytearray(4 << 20)
    seen = set()
    for place in (None, 0, 2 << 20, (4 << 20) - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        seen.add(local_file(path).fingerprint())
    path.write_bytes(bytes(content) + b"x")
    seen.add(local_file(path).fingerprint())
    assert len(seen) == 5
    assert CorpusFile("b.txt", str(path)).fingerprint() not in seen
