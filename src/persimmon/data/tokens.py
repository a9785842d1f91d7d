"""Token stores: the documents of one source, tokenized, in one memory-mapped file.

Layout of `NAME.bin`: little-endian uint16 (vocabularies up to 65,536) or uint32 ids, `E d0 E d1 E ... E` with E the
end-of-text piece. `NAME.idx`: uint64 offsets of every E. So document i with its opening E is
`[offset[i], offset[i + 1])`, and the target of position p is always the id at p + 1: the last piece of a document
learns to predict its end.
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

from persimmon.errors import DataError, NotFoundError


class TokenStore:
    """The tokens and document offsets of one source, memory-mapped."""

    def __init__(self, directory: Path, name: str) -> None:
        manifest = read_manifest(directory)
        if name not in manifest["sources"]:
            raise DataError(f"{directory} has no source {name!r}; it has {', '.join(manifest['sources'])}")
        facts = manifest["sources"][name]
        self.name = name
        self.num_bytes: int = facts["bytes"]
        self._path, self._digest = directory / f"{name}.bin", facts["sha256"]
        dtype = np.dtype(manifest["dtype"])
        index = directory / f"{name}.idx"
        _check_size(self._path, (facts["tokens"] + 1) * dtype.itemsize)
        _check_size(index, (facts["documents"] + 1) * 8)
        self.tokens: NDArray[Any] = np.memmap(self._path, dtype=dtype, mode="r")
        self.offsets: NDArray[np.uint64] = np.fromfile(index, dtype="<u8")
        self._check_offsets(index)

    def _check_offsets(self, index: Path) -> None:
        """Documents must cover the tokens, and each must open with the one end-of-text piece."""
        offsets = self.offsets
        covers = offsets[0] == 0 and offsets[-1] == self.num_tokens and bool(np.all(offsets[1:] > offsets[:-1]))
        if not covers or np.any(self.tokens[offsets] != self.tokens[0]):
            raise DataError(f"{index} does not fit {self._path.name}; prepare the data again")

    @property
    def num_tokens(self) -> int:
        """Positions that have a target."""
        return len(self.tokens) - 1

    def verify(self) -> None:
        """Read all tokens and raise DataError unless they are the ones that were written."""
        with self._path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self._digest:
            raise DataError(f"{self._path}: SHA-256 is {found}, manifest.json says {self._digest}")


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

    return (
        has(data, "dtype", "vocab_size", "sources")
        and has(data["sources"])
        and all(has(facts, "documents", "tokens", "bytes", "sha256", "weight") for facts in data["sources"].values())
    )


class TokenStoreWriter:
    """Writes one source; `finish` returns its entry of the manifest."""

    def __init__(self, directory: Path, name: str, dtype: str, end_of_text: int) -> None:
        self._paths = [directory / f"{name}.bin", directory / f"{name}.idx"]
        self._stream = (directory / f"{name}.bin.partial").open("wb")
        self._dtype, self._end = dtype, end_of_text
        self._offsets: list[int] = [0]
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._write([end_of_text])

    def _write(self, ids: Iterable[int]) -> None:
        raw = np.asarray(ids, dtype=self._dtype).tobytes()
        self._digest.update(raw)
        self._stream.write(raw)

    def add(self, ids: list[int], num_bytes: int) -> None:
        """Append one document's ids (without end-of-text)."""
        self._write([*ids, self._end])
        self._offsets.append(self._offsets[-1] + len(ids) + 1)
        self._bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """Put the files in place."""
        self._stream.close()
        tokens, index = self._paths
        os.replace(self._stream.name, tokens)
        partial = index.with_name(index.name + ".partial")
        np.asarray(self._offsets, dtype="<u8").tofile(partial)
        os.replace(partial, index)
        return {
            "documents": len(self._offsets) - 1,
            "tokens": self._offsets[-1],
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }
