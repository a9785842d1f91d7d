import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.terminal.painter import Painter, Size
from terminal.screen import Screen

LINES = st.lists(st.text("ab \x1b".replace("\x1b", ""), max_size=9), max_size=12)


def painter_on(screen: Screen) -> Painter:
    return Painter(screen, lambda: Size(screen.width, screen.height))


def shown(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines]


@settings(max_examples=300)
@given(st.lists(LINES, min_size=1, max_size=8))
def test_a_block_that_fits_on_the_screen_shows_its_last_state(states: list[list[str]]) -> None:
    screen = Screen(width=10, height=12)
    painter = painter_on(screen)
    for lines in states:
        painter.paint(lines)
    assert screen.text == (shown(states[-1]) or [""])
    assert not screen.scrolled


@settings(max_examples=200)
@given(st.lists(st.text("xyz", max_size=5), min_size=1, max_size=40), st.integers(2, 9))
def test_a_block_taller_than_the_screen_scrolls_and_loses_nothing(words: list[str], height: int) -> None:
    screen = Screen(width=20, height=height)
    painter = painter_on(screen)
    for count in range(1, len(words) + 1):
        painter.paint(words[:count])
    assert screen.text == words


def test_blocks_stand_below_each_other() -> None:
    screen = Screen(20, 5)
    painter = painter_on(screen)
    for block in (["one"], ["", "two", "three"], ["", "four"]):
        painter.paint(["waiting"])
        painter.paint(block)
        painter.keep()
    assert screen.text == ["one", "", "two", "three", "", "four", ""]


def test_lines_out_of_reach_stay_as_they_were() -> None:
    screen = Screen(20, 3)
    painter = painter_on(screen)
    painter.paint(["a", "b", "c", "d", "e"])
    painter.paint(["A", "B", "C", "D", "E"])
    assert screen.text == ["a", "b", "C", "D", "E"]


def test_an_unchanged_block_is_not_written_again() -> None:
    file = io.StringIO()
    painter = Painter(file, lambda: Size(20, 5))
    painter.paint(["one", "two"])
    before = file.getvalue()
    painter.paint(["one", "two"])
    assert file.getvalue() == before
    painter.paint(["one", "two!"])
    assert "one" not in file.getvalue()[len(before) :]


@pytest.mark.parametrize("width", [7, 40])
def test_a_resized_terminal_gets_the_whole_block_again(width: int) -> None:
    file, size = io.StringIO(), Size(20, 10)
    painter = Painter(file, lambda: size)
    painter.paint(["eleven char", "b"])
    before = len(file.getvalue())
    size = Size(width, 10)
    painter.paint(["eleven", "char", "b"])
    written = file.getvalue()[before:]
    rows_above = 2 if width == 7 else 1  # the first line now takes two rows of seven columns
    assert f"\x1b[{rows_above}A\r" in written
    assert written.count("eleven") == 1


def test_rows_that_a_taller_terminal_gains_are_left_alone() -> None:
    file, size = io.StringIO(), Size(20, 3)
    painter = Painter(file, lambda: size)
    painter.paint(list("abcde"))
    size = Size(20, 30)
    before = len(file.getvalue())
    painter.paint(list("ABCDE"))
    assert "B" not in file.getvalue()[before:]
