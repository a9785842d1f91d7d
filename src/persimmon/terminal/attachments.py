"""Text files that go into a conversation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from persimmon.errors import InputError, NotFoundError

MAX_FILE_BYTES = 1 << 20
"""64 bytes for each of 16,384 tokens: a larger text never fits, so it is not even read."""


@dataclass(frozen=True)
class TextFile:
    """A file as the model sees it."""

    name: str
    """Its last path component."""
    text: str

    def fenced(self) -> str:
        """The name, a colon, and the text between fences longer than any run of backticks in it."""
        longest = max((len(run) for run in re.findall(r"`{3,}", self.text)), default=2)
        fence = "`" * (longest + 1)
        return f"{self.name}:\n{fence}\n{self.text.rstrip()}\n{fence}"


def read_text_file(path: str | Path) -> TextFile:
    """Read a UTF-8 text file; anything else is an error that says why."""
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(f"no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    text = _decode(path, path.read_bytes())
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return TextFile(path.name, text)


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 without a byte order mark and with Unix line ends."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start:,}") from None
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds zero bytes")
    return text.replace("\r\n", "\n")
