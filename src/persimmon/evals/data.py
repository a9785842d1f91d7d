"""Records of the evaluation sets: from a data directory, or from the Hugging Face Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persimmon.errors import DataError, NotFoundError, UnavailableError
from persimmon.evals.tasks.task import Record, Source


def read_records(source: Source, directory: Path | None) -> list[Record]:
    """All records of `source`, each with an `id`, from `directory` or else from the Hub.

    Raises:
        NotFoundError: the directory has no such file.
        DataError: a line is not a JSON object.
        UnavailableError: no directory is given and the Hub's client is missing or out of reach.
    """
    rows = _read_hub(source) if directory is None else _read_file(_find(source, directory))
    records: list[Record] = [
        {"id": row.get("task_id", f"{source.file}/{number}"), **row} for number, row in enumerate(rows)
    ]
    if not records:
        raise DataError(f"{source.file} has no records")
    return records


def _find(source: Source, directory: Path) -> Path:
    for ending in (".jsonl", ".jsonl.gz"):
        path = directory / f"{source.file}{ending}"
        if path.is_file():
            return path
    raise NotFoundError(f"no {source.file}.jsonl or {source.file}.jsonl.gz in {directory}")


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, path, number)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}")
    return row


def _read_hub(source: Source) -> Iterator[dict[str, Any]]:
    if not source.hub:
        raise UnavailableError(f"{source.file} is not on the Hub: give --data DIR with {source.file}.jsonl")
    try:
        import datasets  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise UnavailableError(
            f"{source.hub} needs the package datasets (pip install 'persimmon[eval]'), or give --data DIR"
        ) from None
    try:
        rows = datasets.load_dataset(source.hub, source.configuration, split=source.split)
    except Exception as error:  # the client raises anything from OSError to its own kinds
        raise UnavailableError(f"{source.hub} cannot be loaded ({error}); give --data DIR instead") from error
    for row in rows:
        adapted = source.adapt(row)
        if adapted is not None:
            yield adapted


def sample(records: list[Record], limit: int | None) -> list[Record]:
    """The first `limit` records in an order fixed by their ids alone, so that every run takes the same ones.

    File order would take whole subjects of MMLU before the next; this draws evenly.
    """
    if limit is None or limit >= len(records):
        return records
    chosen = sorted(records, key=lambda record: hashlib.sha256(str(record["id"]).encode()).digest())[:limit]
    ids = {record["id"] for record in chosen}
    return [record for record in records if record["id"] in ids]
