"""Token stores: round trip, layout, and damage that must not pass."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_stores import END, write_stores
from persimmon.data.tokens import TokenStore, TokenStoreWriter, read_manifest
from persimmon.errors import DataError, NotFoundError

documents = st.lists(st.lists(st.integers(2, 65_535), max_size=30), max_size=8)


@settings(max_examples=40)
@given(documents=documents)
def test_documents_come_back(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = write_stores(directory, {"text": documents})["text"]
    found = [store.read(a, b).tolist() for a, b in pairwise(store.offsets.astype(int))]
    assert found == [[END, *document] for document in documents]
    assert int(store.shards[-1].tokens[-1]) == END
    assert store.num_tokens == sum(len(document) + 1 for document in documents)
    assert store.num_bytes == sum(2 * len(document) for document in documents)
    store.verify()


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    write_stores(tmp_path, {"text": [[5, 6], [7]]})
    assert np.fromfile(tmp_path / "text-000.bin", "<u2").tolist() == [1, 5, 6, 1, 7, 1]
    assert np.fromfile(tmp_path / "text-000.idx", "<u8").tolist() == [0, 3, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "text-000.bin", "text-000.idx"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, "text", "<u4", 71_013)
    writer.add([262_143, 2], 9)
    facts = {"dtype": "<u4", "vocab_size": 262_144, "sources": {"text": {**writer.finish(), "weight": 1.0}}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    assert TokenStore(tmp_path, "text").shards[0].tokens.tolist() == [71_013, 262_143, 2, 71_013]


def test_nothing_is_in_place_before_finish(tmp_path: Path) -> None:
    TokenStoreWriter(tmp_path, "text", "<u2", END).add([4, 5], 2)
    assert not (tmp_path / "text-000.bin").exists() and not (tmp_path / "text-000.idx").exists()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_stores(tmp_path, {"text": [list(range(2, 40)), [50, 51], [60]], "code": [[9]]})
    return tmp_path


@pytest.mark.parametrize("name", ["text-000.bin", "text-000.idx"])
@pytest.mark.parametrize("change", [-16, -2, -1, 1, 8])
def test_files_of_another_size_are_refused(directory: Path, name: str, change: int) -> None:
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DataError, match=rf"{name}: {len(content) + change} bytes, manifest.json says {len(content)}"):
        TokenStore(directory, "text")


@pytest.mark.parametrize("name", ["text-000.bin", "text-000.idx"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(NotFoundError, match=rf"{name} is missing; prepare the data again"):
        TokenStore(directory, "text")


@pytest.mark.parametrize(
    "offsets", [[1, 39, 42, 44], [0, 39, 39, 44], [0, 42, 39, 44], [0, 38, 42, 44], [0, 39, 42, 43]]
)
def test_an_index_that_does_not_fit_is_refused(directory: Path, offsets: list[int]) -> None:
    assert np.fromfile(directory / "text-000.idx", "<u8").tolist() == [0, 39, 42, 44]
    np.asarray(offsets, "<u8").tofile(directory / "text-000.idx")
    with pytest.raises(DataError, match=r"text-000\.idx does not fit text-000\.bin"):
        TokenStore(directory, "text")


def test_a_huge_offset_is_refused(directory: Path) -> None:
    np.asarray([0, 39, 2**63 + 5, 44], "<u8").tofile(directory / "text-000.idx")
    with pytest.raises(DataError, match="does not fit"):
        TokenStore(directory, "text")


def test_verify_finds_a_single_changed_bit(directory: Path) -> None:
    content = bytearray((directory / "text-000.bin").read_bytes())
    content[20] ^= 4
    (directory / "text-000.bin").write_bytes(content)
    store = TokenStore(directory, "text")
    with pytest.raises(DataError, match=r"text-000\.bin: SHA-256 is \w{64}, manifest\.json says \w{64}"):
        store.verify()


def test_sources_are_named(directory: Path) -> None:
    with pytest.raises(DataError, match="has no source 'prose'; it has text, code"):
        TokenStore(directory, "prose")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"dtype": "<u2", "vocab_size": 9, "sources": []}',
                '{"dtype": "<u2", "vocab_size": 9, "sources": {"text": {"tokens": 3}}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_refused(directory: Path, content: str) -> None:
    (directory / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is (damaged|not a manifest)"):
        read_manifest(directory)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)
