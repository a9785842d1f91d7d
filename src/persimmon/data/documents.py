"""Documents from files: JSON Lines with a `text` per line (plain or gzip), or a plain text file as one document."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

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


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise NotFoundError(f"no file at {path}")
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, record) of every non-empty line; DataError names the first broken one."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    origin = f"{path.name}:{number}"
                    yield origin, _json_object(line, origin)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path.name}: damaged file after line {number} ({error})") from None


def _json_object(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}")
    return record


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file. A record without a string `text` is an error, an empty one is skipped."""
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path.name}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")
    if path.suffix == ".txt":
        yield from _plain_text(path)
        return
    for origin, record in read_json_lines(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise DataError(f"{origin}: `text` must be a string, got {type(text).__name__}")
        if not text.isascii():
            _refuse_surrogates(text, origin)
        if text:
            yield Document(text, origin)


def _plain_text(path: Path) -> Iterator[Document]:
    with _open(path) as stream:
        content = stream.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if text:
        yield Document(text, path.name)


def _refuse_surrogates(text: str, origin: str) -> None:
    """JSON can spell half of a character, which UTF-8 and the tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: `text` holds a lone surrogate at character {error.start}") from None
