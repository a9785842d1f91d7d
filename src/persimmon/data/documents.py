"""Documents from files: JSON Lines or Parquet with a text per record, or a plain text file as one document.

JSON Lines and text may be compressed (`.gz`, `.zst`). A record that is wrong raises DataError with file and line, or
goes to `on_bad`, after which reading goes on with the next record; behind a damaged place of a compressed file or of a
Parquet file nothing more can be read, which is reported the same way.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.data.files import CorpusFile, find_files, local_file
from persimmon.errors import DataError, UnavailableError

__all__ = ["Document", "OnBad", "find_files", "read_documents", "read_json_lines", "read_records", "stop"]

_KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
_BATCH_ROWS = 1_024  # of a Parquet file at a time

OnBad = Callable[[DataError], None]
"""Gets what is wrong with a record that is left out."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from (`file:line`)."""

    text: str
    origin: str


def stop(error: DataError) -> None:
    """The `on_bad` that goes no further."""
    raise error


def read_json_lines(path: Path | CorpusFile, on_bad: OnBad = stop) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, record) of every non-empty line; what is broken goes to `on_bad`."""
    file = local_file(path) if isinstance(path, Path) else path
    number = 0
    try:
        with file.open_text() as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                origin = f"{file.name}:{number}"
                try:
                    record = _json_object(line, origin)
                except DataError as error:
                    on_bad(error)
                else:
                    yield origin, record
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        on_bad(DataError(f"{file.name}: damaged file after line {number} ({error})"))


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


def read_documents(path: Path | CorpusFile, field: str = "text", on_bad: OnBad = stop) -> Iterator[Document]:
    """The documents of one file. A record without a string `field` is an error, an empty one is skipped."""
    return (document for document in read_records(path, field, on_bad) if document.text)


def read_records(path: Path | CorpusFile, field: str = "text", on_bad: OnBad = stop) -> Iterator[Document]:
    """As `read_documents`, with the empty ones."""
    file = local_file(path) if isinstance(path, Path) else path
    kind = "".join(file.suffixes)
    if kind not in _KINDS:
        raise DataError(f"{file.name}: unknown kind of file; expected one of {', '.join(_KINDS)}")
    if file.suffixes[0] == ".txt":
        yield from _plain_text(file, on_bad)
        return
    records = _parquet(file, field, on_bad) if kind == ".parquet" else read_json_lines(file, on_bad)
    for origin, record in records:
        text = record.get(field)
        if not isinstance(text, str):
            on_bad(DataError(f"{origin}: `{field}` must be a string, got {type(text).__name__}"))
        elif (place := _surrogate(text)) is not None:
            on_bad(DataError(f"{origin}: `{field}` holds a lone surrogate at character {place}"))
        else:
            yield Document(text, origin)


def _plain_text(file: CorpusFile, on_bad: OnBad) -> Iterator[Document]:
    try:
        with file.open_text() as stream:
            content = stream.read()
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        on_bad(DataError(f"{file.name}: damaged file ({error})"))
        return
    try:
        yield Document(content.decode(), file.name)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        on_bad(DataError(f"{file.name}:{line}: not UTF-8 ({error.reason} at byte {error.start})"))


def _parquet(file: CorpusFile, field: str, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UnavailableError(".parquet files need pyarrow: pip install 'persimmon[data]'") from None
    number = 0
    try:
        with file.open() as stream:
            table = parquet.ParquetFile(stream)
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                on_bad(DataError(f"{file.name}: has no column {field!r}; it has {names}"))
                return
            for batch in table.iter_batches(_BATCH_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", {field: text}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        on_bad(DataError(f"{file.name}: damaged file after row {number} ({str(error).splitlines()[0]})"))


def _surrogate(text: str) -> int | None:
    """Where half of a character stands, which JSON can spell but UTF-8 and the tokenizer cannot."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
