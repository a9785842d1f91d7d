"""Token stores: the documents of one source, tokenized, in memory-mapped shards.

Layout of a shard `SHARD.bin`: little-endian uint16 (vocabularies up to 65,536) or uint32 ids, `E d0 E d1 E ... E`
with E the end-of-text piece. `SHARD.idx`: uint64 offsets of every E. So document i with its opening E is
`[offset[i], offset[i + 1])`, and the target of position p is always the id at p + 1: the last piece of a document
learns to predict its end. Laid end to end, the last E of a shard being the first of the next, the shards of a source
are one store: how many there are changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.atomic import write_bytes
from persimmon.errors import DataError, NotFoundError

_LARGEST_SHARD = 1_000_000_000  # tokens: 2 or 4 GB per file


class TokenShard:
    """One pair of files, memory-mapped. `facts` is its entry in the manifest."""

    def __init__(self, directory: Path, facts: dict[str, Any], dtype: np.dtype[Any]) -> None:
        self.path, self.index = directory / f"{facts['file']}.bin", directory / f"{facts['file']}.idx"
        self._digests = {self.path: facts["sha256"], self.index: facts.get("index_sha256")}
        _check_size(self.path, (facts["tokens"] + 1) * dtype.itemsize)
        _check_size(self.index, (facts["documents"] + 1) * 8)
        self.tokens: NDArray[Any] = np.memmap(self.path, dtype=dtype, mode="r")
        self.offsets: NDArray[np.uint64] = np.fromfile(self.index, dtype="<u8")
        self._check_offsets()

    def _check_offsets(self) -> None:
        """Documents must cover the tokens, and each must open with the one end-of-text piece."""
        offsets = self.offsets
        covers = offsets[0] == 0 and offsets[-1] == len(self.tokens) - 1 and bool(np.all(offsets[1:] > offsets[:-1]))
        if not covers or np.any(self.tokens[offsets] != self.tokens[0]):
            raise DataError(f"{self.index} does not fit {self.path.name}; prepare the data again")

    def verify(self) -> None:
        """Read both files and raise DataError unless they are the ones that were written."""
        for path, expected in self._digests.items():
            if expected is None:  # of an index written before it had a checksum
                continue
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != expected:
                raise DataError(f"{path}: SHA-256 is {found}, manifest.json says {expected}")


class TokenStore:
    """The tokens and document offsets of one source."""

    def __init__(self, directory: Path, name: str) -> None:
        manifest = read_manifest(directory)
        if name not in manifest["sources"]:
            raise DataError(f"{directory} has no source {name!r}; it has {', '.join(manifest['sources'])}")
        facts = manifest["sources"][name]
        self.name = name
        self.num_bytes: int = facts["bytes"]
        dtype = np.dtype(manifest["dtype"])
        # A manifest without shards is of the first layout: one shard named as the source.
        shards = facts.get("shards", [{**facts, "file": name}])
        self.shards = [TokenShard(directory, shard, dtype) for shard in shards]
        if not self.shards:
            raise DataError(f"source {name!r} of {directory} has no shards")
        sizes = [len(shard.tokens) - 1 for shard in self.shards]
        self._starts = np.cumsum([0, *sizes])
        whole = [shard.offsets[:-1] + np.uint64(start) for shard, start in zip(self.shards, self._starts, strict=False)]
        self.offsets: NDArray[np.uint64] = np.concatenate([*whole, np.array([self._starts[-1]], dtype=np.uint64)])

    @property
    def num_tokens(self) -> int:
        """Positions that have a target."""
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The ids at [start, stop) of one document, where `stop` may take in the end-of-text behind it."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        shard = min(shard, len(self.shards) - 1)
        begin = int(self._starts[shard])
        return self.shards[shard].tokens[start - begin : stop - begin]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its opening end-of-text counted."""
        offsets = self.offsets.astype(np.int64)
        lengths: NDArray[np.int64] = offsets[1:] - offsets[:-1]
        return lengths

    def verify(self) -> None:
        """Read all files and raise DataError unless they are the ones that were written."""
        for shard in self.shards:
            shard.verify()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise NotFoundError(f"{path} is missing; prepare the data again")
    found = path.stat().st_size
    if found != expected:
        raise DataError(f"{path}: {found} bytes, manifest.json says {expected}; prepare the data again")


def read_manifest(directory: Path) -> dict[str, Any]:
    """`manifest.json` of a data directory."""
    file = directory / "manifest.json"
    if not file.is_file():
        raise NotFoundError(f"no prepared data at {directory} (manifest.json is missing)")
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); prepare the data again") from None
    if not _is_manifest(manifest):
        raise DataError(f"{file} is not a manifest of prepared data; prepare the data again")
    return manifest


def _is_manifest(data: Any) -> bool:
    def has(entry: Any, *keys: str) -> bool:
        return isinstance(entry, dict) and all(key in entry for key in keys)

    def is_source(facts: Any) -> bool:
        if not has(facts, "documents", "tokens", "bytes", "weight"):
            return False
        shards = facts.get("shards", [{**facts, "file": ""}])
        keys = ("file", "documents", "tokens", "sha256")
        return isinstance(shards, list) and all(has(shard, *keys) for shard in shards)

    return (
        has(data, "dtype", "vocab_size", "sources")
        and has(data["sources"])
        and all(is_source(facts) for facts in data["sources"].values())
    )


def check_vocabulary(directory: Path, serialized: bytes) -> None:
    """Raise DataError unless the data at `directory` was tokenized with the vocabulary `serialized`."""
    manifest = read_manifest(directory)
    expected = manifest.get("tokenizer_sha256")
    found = hashlib.sha256(serialized).hexdigest()
    if expected is not None and found != expected:
        raise DataError(
            f"{directory} was tokenized with another vocabulary (SHA-256 {expected[:12]}..., this one is "
            f"{found[:12]}...); prepare the data with `vocabulary.path` of this one"
        )


class TokenStoreWriter:
    """Writes shards `NAME-000`, `NAME-001`, ... of a source; `finish` returns its entry of the manifest."""

    def __init__(
        self, directory: Path, name: str, dtype: str, end_of_text: int, shard_tokens: int = _LARGEST_SHARD
    ) -> None:
        self._directory, self._name, self._limit = directory, name, shard_tokens
        self._dtype, self._end = dtype, end_of_text
        self._bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self._file = f"{self._name}-{len(self._shards):03d}"
        self._stream = (self._directory / f"{self._file}.bin.partial").open("wb")
        self._offsets, self._digest = [0], hashlib.sha256()
        self._write([self._end])

    def _write(self, ids: Iterable[int]) -> None:
        raw = np.asarray(ids, dtype=self._dtype).tobytes()
        self._digest.update(raw)
        self._stream.write(raw)

    def add(self, ids: list[int], num_bytes: int) -> None:
        """Append one document's ids (without end-of-text)."""
        if self._offsets[-1] and self._offsets[-1] + len(ids) + 1 > self._limit:
            self._close()
            self._open()
        self._write([*ids, self._end])
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        self._bytes += num_bytes

    def _close(self) -> None:
        self._stream.close()
        tokens, index = (self._directory / f"{self._file}{ending}" for ending in (".bin", ".idx"))
        os.replace(self._stream.name, tokens)
        raw = np.asarray(self._offsets, dtype="<u8").tobytes()
        write_bytes(index, raw)
        self._shards.append(
            {
                "file": self._file,
                "documents": len(self._offsets) - 1,
                "tokens": self._offsets[-1],
                "sha256": self._digest.hexdigest(),
                "index_sha256": hashlib.sha256(raw).hexdigest(),
            }
        )

    def finish(self) -> dict[str, Any]:
        """Put the last files in place."""
        self._close()
        return {
            "documents": sum(shard["documents"] for shard in self._shards),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "bytes": self._bytes,
            "shards": self._shards,
        }
