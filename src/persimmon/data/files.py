"""Files of a corpus: local or on the Hugging Face Hub (`hf://datasets/OWNER/NAME[@REVISION]/PATH`)."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from persimmon.errors import DataError, NotFoundError, UnavailableError

HUB = "hf://"

_SAMPLE_BYTES = 1 << 20
"""Of larger files the fingerprint reads three stretches of this many bytes."""


@dataclass(frozen=True)
class CorpusFile:
    """One file: what errors and origins call it, and where it is."""

    name: str
    location: str
    """A local path, or `hf://...`."""

    @property
    def suffixes(self) -> tuple[str, str]:
        """(kind, compression), such as (".jsonl", ".gz") or (".parquet", "")."""
        path = Path(self.name)
        compression = path.suffix if path.suffix in (".gz", ".zst") else ""
        return Path(path.stem).suffix if compression else path.suffix, compression

    def open(self) -> BinaryIO:
        """The bytes as they are stored."""
        if self.location.startswith(HUB):
            return cast(BinaryIO, _hub().open(self.location.removeprefix(HUB), "rb"))
        if not Path(self.location).is_file():
            raise NotFoundError(f"no file at {self.location}")
        return Path(self.location).open("rb")

    def open_text(self) -> BinaryIO:
        """The bytes behind the compression."""
        stream, compression = self.open(), self.suffixes[1]
        if compression == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
        return cast(BinaryIO, io.BufferedReader(_zstd(stream))) if compression == ".zst" else stream

    @property
    def size(self) -> int:
        """Stored bytes."""
        if self.location.startswith(HUB):
            return int(_hub().info(self.location.removeprefix(HUB))["size"])
        return Path(self.location).stat().st_size

    def fingerprint(self) -> str:
        """Changes when the file does: from its name, its size and its first, middle and last MiB."""
        size = self.size
        digest = hashlib.sha256(f"{self.name}:{size}".encode())
        with self.open() as stream:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)) if size > 3 * _SAMPLE_BYTES else (0,):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES * (1 if start or size > 3 * _SAMPLE_BYTES else 3)))
        return digest.hexdigest()


def local_file(path: Path) -> CorpusFile:
    """A local file, called by its last name."""
    return CorpusFile(path.name, str(path))


def find_files(root: Path, patterns: Sequence[str]) -> list[Path]:
    """Files under `root` that match any of the glob patterns, sorted; a leading `!` leaves matches out."""
    chosen: set[Path] = set()
    for pattern in patterns:
        if not pattern.removeprefix("!") or Path(pattern.removeprefix("!")).is_absolute():
            raise DataError(f"file pattern {pattern!r} must be a path relative to {root}")
        matches = {p for p in root.glob(pattern.removeprefix("!")) if p.is_file()}
        if pattern.startswith("!"):
            chosen -= matches
        elif not matches:
            raise NotFoundError(f"no file matches {root / pattern}")
        else:
            chosen |= matches
    return sorted(chosen)


def find_corpus_files(root: Path, patterns: Sequence[str]) -> list[CorpusFile]:
    """Local files under `root` and files of the hub, in order of their place; a leading `!` leaves matches out."""
    local = [pattern for pattern in patterns if not pattern.removeprefix("!").startswith(HUB)]
    files = [CorpusFile(path.relative_to(root).as_posix(), str(path)) for path in find_files(root, local)]
    names: set[str] = set()
    for pattern in (pattern for pattern in patterns if pattern not in local):
        matches = _hub_matches(pattern.removeprefix("!"))
        if not matches and not pattern.startswith("!"):
            raise NotFoundError(f"no file matches {pattern}")
        names = names - matches if pattern.startswith("!") else names | matches
    return files + [CorpusFile(name, HUB + name) for name in sorted(names)]


def _hub_matches(pattern: str) -> set[str]:
    try:
        return {str(name) for name in _hub().glob(pattern.removeprefix(HUB))}
    except Exception as error:  # the hub's client raises its own kinds, OSError and those of its transport
        raise UnavailableError(f"{pattern} cannot be listed ({type(error).__name__}: {error})") from error


def _hub() -> Any:
    """The hub as a file system; it reads HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def _zstd(stream: BinaryIO) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UnavailableError(".zst files need pyarrow: pip install 'persimmon[data]'") from None
    return _Readable(pyarrow.CompressedInputStream(stream, "zstd"))


class _Readable(io.RawIOBase):
    """What `io.BufferedReader` needs of pyarrow's stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece: bytes = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()
