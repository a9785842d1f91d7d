"""`data prepare` end to end on a small made corpus."""

from __future__ import annotations

import gzip
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from made_corpus import made_code, made_text
from persimmon.data.documents import read_documents
from persimmon.data.packing import PackedRows
from persimmon.data.prepare import DataRecipe, SourceRecipe, VocabularyRecipe, is_held_out, prepare
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.errors import ConfigError, DataError, NotFoundError
from persimmon.tokenizer import Tokenizer

TEXTS = [made_text(seed, 4 + seed) for seed in range(30)]
CODE = [made_code(seed, 2 + seed) for seed in range(15)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of text with duplicates within and between them, one of code with a text in it."""
    root = tmp_path_factory.mktemp("corpus")
    write_lines(root / "text1.jsonl.gz", [*TEXTS[:20], TEXTS[0]])
    write_lines(root / "text2.jsonl.gz", [*TEXTS[18:], TEXTS[19]])
    write_lines(root / "code.jsonl.gz", [*CODE, TEXTS[3]])
    return root


def recipe(root: Path, output: Path, **changes: Any) -> DataRecipe:
    sources = {"text": SourceRecipe(("text*.jsonl.gz",), 0.75), "code": SourceRecipe(("code.jsonl.gz",), 0.25)}
    settings: dict[str, Any] = {"sources": sources, "vocabulary": VocabularyRecipe(320, 60_000), "held_out": 0.2}
    return DataRecipe(root=str(root), output=str(output), **{**settings, **changes})


@pytest.fixture(scope="module")
def prepared(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    prepare(recipe(root, output))
    return output


def stored_texts(directory: Path, name: str) -> list[str]:
    store, tokenizer = TokenStore(directory, name), Tokenizer.load(directory)
    return [tokenizer.decode(store.read(a, b)[1:].tolist()) for a, b in pairwise(store.offsets.astype(int).tolist())]


def held_out_texts(directory: Path, name: str) -> list[str]:
    return [document.text for document in read_documents(directory / f"held_out.{name}.jsonl.gz")]


def test_every_document_is_either_trained_on_or_held_out(prepared: Path) -> None:
    for name, expected in (("text", TEXTS), ("code", [*CODE, TEXTS[3]])):
        stored, held = stored_texts(prepared, name), held_out_texts(prepared, name)
        assert sorted(stored + held) == sorted(expected)  # so duplicates of a source are gone
        assert held and not set(stored) & set(held)
    everything = {name: set(stored_texts(prepared, name)) for name in ("text", "code")}
    for name, other in (("text", "code"), ("code", "text")):
        assert not set(held_out_texts(prepared, name)) & everything[other]


def test_the_manifest_counts_what_is_there(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert (manifest["dtype"], manifest["vocab_size"]) == ("<u2", 320)
    for name, weight in (("text", 0.75), ("code", 0.25)):
        facts, store = manifest["sources"][name], TokenStore(prepared, name)
        store.verify()
        stored = stored_texts(prepared, name)
        assert facts["weight"] == weight
        assert facts["documents"] == len(stored)
        assert facts["bytes"] == sum(len(text.encode()) for text in stored)
        assert facts["tokens"] == store.num_tokens
        tokenizer = Tokenizer.load(prepared)
        assert facts["tokens"] == sum(1 + len(tokenizer.encode(text)) for text in stored)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_a_second_run_writes_the_same_bytes(prepared: Path, root: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    prepare(recipe(root, tmp_path), lines.append)
    assert digests(tmp_path) == digests(prepared)
    assert [line.split(":")[0] for line in lines] == ["text"] * 2 + ["code", "vocabulary", "text", "code"]
    assert "text: dropped 4 duplicate" in lines
    prepare(recipe(root, tmp_path), lines.append)  # a finished run is recognised
    assert lines[-1].endswith("holds this recipe's data already")
    prepare(recipe(root, tmp_path, seed=1))  # another recipe's output gives way
    prepare(recipe(root, tmp_path))
    assert digests(tmp_path) == digests(prepared)


def test_a_given_vocabulary_is_used(prepared: Path, root: Path, tmp_path: Path) -> None:
    vocabulary = VocabularyRecipe(path=str(prepared / "tokenizer.model"))
    prepare(recipe(root, tmp_path, vocabulary=vocabulary))
    assert digests(tmp_path) | {"manifest.json": ""} == digests(prepared) | {"manifest.json": ""}
    assert read_manifest(tmp_path)["sources"] == read_manifest(prepared)["sources"]


def test_prepared_data_packs_into_rows(prepared: Path) -> None:
    stores = {name: TokenStore(prepared, name) for name in ("text", "code")}
    row = PackedRows(stores, {"text": 0.75, "code": 0.25}, 64, 0)[0]
    assert row.source == "text"
    assert int(row.token_ids.max()) < 320


@pytest.mark.parametrize("text", ["", "a", "Ein längerer Text.\n" * 50])
def test_held_out_is_a_share_of_hash_space(text: str) -> None:
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)
    # Raising the share only adds documents.
    decisions = [is_held_out(text, share / 100) for share in range(101)]
    assert decisions == sorted(decisions)


def test_about_the_asked_share_is_held_out() -> None:
    held = sum(is_held_out(f"document {i}", 0.1) for i in range(2000))
    assert 150 < held < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.5}, r"held_out must be in \[0, 0\.5\), got 0\.5"),
        ({"held_out": -0.1}, "held_out must be in"),
        ({"sources": {}}, "at least one source"),
        ({"sources": {"a/b": SourceRecipe(("x",), 1.0)}}, "source names become file names.*'a/b'"),
        ({"sources": {"a.b": SourceRecipe(("x",), 1.0)}}, "source names become file names.*'a.b'"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, tmp_path, **changes)


def test_weights_must_be_positive() -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="weight must be positive"):
            SourceRecipe(("x",), weight)


def test_missing_and_empty_sources_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file matches .*nothing\*"):
        prepare(recipe(root, tmp_path / "a", sources={"text": SourceRecipe(("nothing*",), 1.0)}))
    write_lines(tmp_path / "empty.jsonl.gz", [""])
    with pytest.raises(DataError, match=r"source 'text' has no documents for training \(0 held out\)"):
        prepare(recipe(tmp_path, tmp_path / "b", sources={"text": SourceRecipe(("empty*",), 1.0)}))
    assert not (tmp_path / "b" / "manifest.json").exists()
