import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.terminal.gauge import Fullness, bar, closing_line

FACTS = ["stopped", "120 tokens", "80 tokens/s"]


@pytest.mark.parametrize(("used", "filled"), [(0, 0), (1, 1), (8_192, 6), (16_384, 12), (20_000, 12)])
def test_bar(used: int, filled: int) -> None:
    assert bar(Fullness(used, 16_384)).plain == "━" * filled + "─" * (12 - filled)


def test_the_colour_warns() -> None:
    assert [Fullness(n, 100).style for n in (0, 74, 75, 89, 90, 120)] == [
        "accent", "accent", "nearly-full", "nearly-full", "full", "full",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (80, "stopped · 120 tokens · 80 tokens/s · ━─────────── 1,234 of 16,384 tokens"),
        (65, "stopped · 120 tokens · 80 tokens/s · 1,234 of 16,384 tokens"),
        (55, "stopped · 120 tokens · 80 tokens/s · 1,234 of 16,384"),
        (45, "stopped · 120 tokens · 1,234 of 16,384"),
        (30, "stopped · 1,234 of 16,384"),
        (20, "1,234 of 16,384"),
        (10, "8%"),
    ],
)
def test_what_does_not_fit_is_left_out(width: int, line: str) -> None:
    assert closing_line(FACTS, Fullness(1_234, 16_384), width).plain == line


def test_ascii() -> None:
    line = closing_line(["1 token"], Fullness(8_192, 16_384), 60, ascii_only=True)
    assert line.plain == "1 token - ######------ 8,192 of 16,384 tokens"


@given(st.lists(st.text(max_size=12), max_size=3), st.integers(0, 20_000), st.integers(4, 100))
def test_the_line_always_fits(facts: list[str], used: int, width: int) -> None:
    assert closing_line(facts, Fullness(used, 16_384), width).cell_len <= width
