"""`persimmon data prepare`: documents to a vocabulary, token stores, held-out documents and their manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persimmon.data.documents import Document, find_files, read_documents
from persimmon.data.tokens import TokenStoreWriter
from persimmon.data.vocabulary import sample_texts, train_vocabulary
from persimmon.errors import ConfigError, DataError
from persimmon.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceRecipe:
    """Files of one source and its share of the training tokens."""

    files: tuple[str, ...]
    """Glob patterns below the root; a leading `!` leaves matches out."""
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True)
class VocabularyRecipe:
    """A vocabulary to train, or the `path` of one to use."""

    size: int = 8192
    """Pieces, with the 256 bytes and `|ENDOFTEXT|`."""
    characters: int = 12_000_000
    """Size of the sample it is trained on."""
    path: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """What to read, how to tokenize it and where to put it."""

    root: str
    output: str
    sources: dict[str, SourceRecipe]
    vocabulary: VocabularyRecipe = field(default_factory=VocabularyRecipe)
    held_out: float = 0.015
    """Share of the documents kept out of training, chosen by the hash of their text."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 0.5:
            raise ConfigError(f"held_out must be in [0, 0.5), got {self.held_out}")
        if not self.sources:
            raise ConfigError("a data recipe needs at least one source")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ConfigError(
                    f"source names become file names and hold letters, digits, _ and - only, got {name!r}"
                )


def is_held_out(text: str, share: float) -> bool:
    """Decides by the text alone, so that the same document is held out in every recipe."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def prepare(recipe: DataRecipe, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run the recipe; returns the manifest it wrote. `report` gets one line per finished part."""
    root, output = Path(recipe.root), Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    documents = {name: list(_documents(root, source)) for name, source in recipe.sources.items()}
    kept, held = {}, {}
    for name, items in documents.items():
        held[name] = [d for d in items if is_held_out(d.text, recipe.held_out)]
        kept[name] = [d for d in items if not is_held_out(d.text, recipe.held_out)]
        if not kept[name]:
            raise DataError(f"source {name!r} has no documents for training ({len(held[name])} held out)")
        report(f"{name}: {len(kept[name])} documents for training, {len(held[name])} held out")
    tokenizer = _vocabulary(recipe, kept, output)
    report(f"vocabulary: {tokenizer.vocab_size} pieces")
    dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"
    facts = {}
    for name, items in kept.items():
        writer = TokenStoreWriter(output, name, dtype, tokenizer.eos_id)
        for document in items:
            writer.add(tokenizer.encode(document.text), len(document.text.encode()))
        facts[name] = {**writer.finish(), "weight": recipe.sources[name].weight}
        ratio = facts[name]["bytes"] / facts[name]["tokens"]
        report(f"{name}: {facts[name]['tokens']:,} tokens, {ratio:.2f} bytes each")
        _write_held_out(output / f"held_out.{name}.jsonl.gz", held[name])
    manifest = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "sources": facts}
    _write_atomically(output / "manifest.json", json.dumps(manifest, indent=2).encode())
    return manifest


def _documents(root: Path, source: SourceRecipe) -> Iterator[Document]:
    """All documents of a source, exact duplicates left out."""
    seen: set[bytes] = set()
    for path in find_files(root, source.files):
        for document in read_documents(path):
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


def _vocabulary(recipe: DataRecipe, kept: dict[str, list[Document]], output: Path) -> Tokenizer:
    target = output / "tokenizer.model"
    if recipe.vocabulary.path is not None:
        tokenizer = Tokenizer.load(recipe.vocabulary.path)
        _write_atomically(target, tokenizer.serialized)
        return tokenizer
    weights = {name: source.weight for name, source in recipe.sources.items()}
    total = sum(weights.values())
    texts = sample_texts(
        {name: (d.text for d in items) for name, items in kept.items()},
        {name: weight / total for name, weight in weights.items()},
        recipe.vocabulary.characters,
        recipe.seed,
    )
    _write_atomically(target, train_vocabulary(texts, recipe.vocabulary.size))
    return Tokenizer.load(target)


def _write_held_out(path: Path, documents: list[Document]) -> None:
    lines = "".join(json.dumps({"text": d.text, "source": d.origin}, ensure_ascii=False) + "\n" for d in documents)
    _write_atomically(path, gzip.compress(lines.encode(), mtime=0))


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
