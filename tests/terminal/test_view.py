import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.theme import Theme

from persimmon.terminal import view as view_module
from persimmon.terminal.console import STYLES
from persimmon.terminal.view import MarkdownView
from terminal.screen import Screen

ANSWER = """# Menu

Today there is **soup** and a very long explanation of what is in it, in
two lines.

- leek
- potato

```python
for spoon in soup:
    eat(spoon)
```

Enjoy your 食事!
"""


def shown(pieces: list[str], *, width: int = 40, height: int = 50) -> list[str]:
    screen = Screen(width, height)
    console = Console(
        file=screen, width=width, height=height, theme=Theme(STYLES), force_terminal=True, color_system="standard",
        legacy_windows=False, _environ={},
    )  # fmt: skip
    view = MarkdownView(console)
    view.wait("...")
    for piece in pieces:
        view.add(piece)
    view.finish()
    return screen.text


@pytest.fixture(autouse=True)
def paint_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "_FRAME_SECONDS", 0.0)
    monkeypatch.setattr(view_module, "_PAINTING_SHARE", float("inf"))


def test_the_whole_answer_stands_there_once() -> None:
    whole = shown([ANSWER])
    assert whole[:3] == ["Menu", "", "Today there is soup and a very long"]
    assert "• leek" in whole
    assert whole[-2:] == ["Enjoy your 食事!", ""]
    assert "..." not in whole


@pytest.mark.parametrize("size", [1, 3, 10])
def test_streaming_ends_as_printing_at_once(size: int) -> None:
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    assert shown(pieces) == shown([ANSWER])


def test_a_long_answer_scrolls_on_a_small_screen() -> None:
    words = [f"word{n} " for n in range(300)]
    lines = shown(words, width=30, height=6)
    assert " ".join(lines).split() == [word.strip() for word in words]


def test_a_long_list_scrolls_on_a_small_screen() -> None:
    assert shown([f"- item {n}\n" for n in range(60)], width=30, height=6)[:-1] == [f"• item {n}" for n in range(60)]


def test_an_answer_without_text_leaves_nothing() -> None:
    assert shown([]) == [""]


def test_control_characters_are_not_obeyed() -> None:
    assert shown(["\x1b[2Jwiped\x07?"]) == ["[2Jwiped?", ""]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab *`#->1.\n", max_size=8), max_size=12))
def test_any_stream_ends_as_printing_at_once(pieces: list[str]) -> None:
    assert shown(pieces, width=20) == shown(["".join(pieces)], width=20)
