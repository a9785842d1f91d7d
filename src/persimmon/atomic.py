"""Files that appear whole or not at all: written under another name beside them, flushed to disk, and renamed.

Directories that do so are `checkpoints/staging.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """The name to write under; it becomes `path` when the block ends well. Else it goes, and `path` is as it was.

    private: only the file's owner may read it.
    """
    # With the process in it, as several processes of a run may write the same file, which is then the same from each.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch(0o600 if private else 0o666, exist_ok=False)
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8 and with the line ends it has."""
    write_bytes(path, text.encode())


def _flush(path: Path) -> None:
    # Else a crash soon after the rename may leave the new name on an empty file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
