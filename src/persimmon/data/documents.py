"""Documents from files: JSON Lines (plain, gzip), one `text` per line, or plain text files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from persimmon.errors import DataError, NotFoundError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


@dataclass(frozen=True)
class Document:
    """One text and where it came from (`file:line`)."""

    text: str
    origin: str


def find_files(root: Path, patterns: Sequence[str]) -> list[Path]:
    """Files under `root` that match any of the glob patterns, sorted; a leading `!` leaves matches out."""
    chosen: set[Path] = set()
    for pattern in patterns:
        matches = {p for p in root.glob(pattern.removeprefix("!")) if p.is_file()}
        if pattern.startswith("!"):
            chosen -= matches
        elif not matches:
            raise NotFoundError(f"no file matches {root / pattern}")
        else:
            chosen |= matches
    return sorted(chosen)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, record) of every non-empty line; DataError names the first broken one."""
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                origin = f"{path.name}:{number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{origin}: not JSON ({error.msg})") from None
                if not isinstance(record, dict):
                    raise DataError(f"{origin}: expected an object, got {type(record).__name__}")
                yield origin, record
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: damaged file ({error})") from None


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file. A record without a string `text` is an error, an empty one is skipped."""
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path.name}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")
    if path.suffix == ".txt":
        yield Document(path.read_text(encoding="utf-8"), path.name)
        return
    for origin, record in read_json_lines(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise DataError(f"{origin}: `text` must be a string, got {type(text).__name__}")
        if text:
            yield Document(text, origin)
