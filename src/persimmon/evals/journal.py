"""What a run has finished, kept so that a kill at any moment costs at most the batch it was in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persimmon.errors import InputError


class Journal:
    """Finished batches of one task, one JSON line each, behind a line that says of which run.

    With no path it keeps nothing.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self.entries: dict[int, list[dict[str, Any]]] = {}

    def __enter__(self) -> Journal:
        if self._path is None:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(_whole_lines(self._file.read())):
            entry = json.loads(line)
            if number == 0 and entry.get("fingerprint") != self._fingerprint:
                self._file.close()
                raise InputError(
                    f"{self._path} is of a run with another model, other questions or other settings: "
                    "choose another output directory, or remove it"
                )
            if number:
                self.entries[entry["batch"]] = entry["answers"]
            whole += len(line)
        self._file.truncate(whole)
        if whole == 0:
            self._append({"fingerprint": self._fingerprint})
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def add(self, batch: int, answers: list[dict[str, Any]]) -> None:
        """Write a finished batch through to the disk."""
        if self._path is not None:
            self._append({"batch": batch, "answers": answers})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(content: bytes) -> Iterator[bytes]:
    """Lines up to the first that a kill left unfinished."""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        yield line
