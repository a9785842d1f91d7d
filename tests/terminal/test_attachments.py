import os
from pathlib import Path

import pytest

from persimmon.errors import InputError, NotFoundError
from persimmon.terminal.attachments import MAX_FILE_BYTES, TextFile, read_text_file


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_text_is_read_with_unix_line_ends_and_without_a_mark(tmp_path: Path) -> None:
    file = read_text_file(write(tmp_path / "menu.txt", "\ufeffsoup\r\ncafé\n".encode()))
    assert file == TextFile("menu.txt", "soup\ncafé\n")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", b"x")
    assert read_text_file("~/a.txt").text == "x"


def test_a_file_stands_in_a_fenced_block_under_its_name() -> None:
    assert TextFile("a.txt", "soup\n").fenced() == "a.txt:\n```\nsoup\n```"


def test_the_fence_is_longer_than_any_inside() -> None:
    assert TextFile("a.md", "```py\nx\n````\n").fenced().startswith("a.md:\n`````\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x89PNG\r\n", "not UTF-8 text: byte 0x89 at 0"),
        (b"abc\xff", "byte 0xff at 3"),
        (b"a\0b", "zero bytes"),
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"x" * (MAX_FILE_BYTES + 1), "at most 1,048,576 are read"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_text_file(write(tmp_path / "f", content))


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        read_text_file(tmp_path / "missing")
    with pytest.raises(InputError, match="not a regular file"):
        read_text_file(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="not a regular file"):
        read_text_file(tmp_path / "fifo")
