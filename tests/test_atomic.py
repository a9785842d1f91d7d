"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from persimmon.atomic import replacing, write_bytes, write_text
from persimmon.errors import InputError
from persimmon.figures import save_figure


def test_content_arrives_as_it_is_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one\r\ntwö\n")
    write_bytes(tmp_path / "b", bytes(range(256)))
    assert (tmp_path / "a.txt").read_bytes() == "one\r\ntwö\n".encode()
    assert (tmp_path / "b").read_bytes() == bytes(range(256))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        assert (tmp_path / "a").read_text() == "old"
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("flush"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    write_text(tmp_path / "a", "new")
    assert done == ["flush", "rename"]


def test_permissions_are_the_users_own_or_private(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "open", "x")
        with replacing(tmp_path / "private", private=True) as partial:
            partial.write_text("x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "private")]
    assert modes == [0o644, 0o600]


def test_a_leftover_of_a_killed_process_of_the_same_number_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}.partial").write_text("left")
    write_text(tmp_path / "a", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_figures_have_the_format_of_their_ending(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    save_figure(figure, tmp_path / "new" / "a.svg")
    assert b"<svg" in (tmp_path / "new" / "a.svg").read_bytes()
    with pytest.raises(InputError, match=r"ends in one of .*png.*, got .*picture"):
        save_figure(figure, tmp_path / "picture")
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
