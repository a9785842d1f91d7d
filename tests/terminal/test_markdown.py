import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.theme import Theme

from persimmon.terminal.console import STYLES
from persimmon.terminal.markdown import render_markdown


def rendered(source: str, *, width: int = 40, ascii_only: bool = False, colour: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if colour else None
    console = Console(
        file=file, width=width, theme=Theme(STYLES), force_terminal=colour, color_system=system, _environ={}
    )
    console.print(render_markdown(source, ascii_only=ascii_only))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))


def test_line_ends_in_a_paragraph_stay() -> None:
    assert rendered("12 Mill Road\nCambridge") == "12 Mill Road\nCambridge"


def test_one_blank_line_between_blocks() -> None:
    assert rendered("# Title\ntext\n\n\n> quote") == "Title\n\ntext\n\n│ quote"


def test_lists_keep_their_numbers_nesting_and_blank_lines() -> None:
    assert rendered("- a\n  1. x\n  2. y\n- b") == "• a\n  1. x\n  2. y\n• b"
    assert rendered("9. nine\n10. ten") == " 9. nine\n10. ten"
    assert rendered("1. a\n\n   more\n\n2. b") == "1. a\n\n   more\n\n2. b"
    assert rendered("-") == "•"


def test_long_items_are_indented() -> None:
    assert rendered("- one two three four", width=12) == "• one two\n  three four"


def test_code_stands_at_the_left_edge_with_every_space() -> None:
    lines = rendered("```python\ndef f():\n    return 1\n\n\tx\n```").split("\n")
    assert lines[0].startswith("python ─")
    assert lines[1:5] == ["def f():", "    return 1", "", "    x"]
    assert set(lines[5]) == {"─"}


def test_long_code_lines_wrap() -> None:
    code = "x" * 95
    assert "".join(rendered(f"```\n{code}\n```").split("\n")[1:-1]) == code


def test_an_open_fence_is_code_already() -> None:
    assert rendered("```\n**a**").split("\n")[1] == "**a**"


def test_unknown_languages_are_plain() -> None:
    assert "x = 1" in rendered("```no-such-language\nx = 1\n```")


def test_tables() -> None:
    lines = rendered("| name | n |\n|:--|--:|\n| a | 1 |\n| b | 200 |").split("\n")
    assert lines[0].split() == ["name", "n"]
    assert lines[2].split() == ["a", "1"]
    assert lines[3].endswith("200") and lines[2].endswith("  1")


def test_links_show_where_they_lead() -> None:
    assert rendered("[here](http://a.b) <http://c.d> ![cat](cat.png)", width=80) == (
        "here (http://a.b) http://c.d cat (cat.png)"
    )


def test_html_and_definitions_are_text() -> None:
    assert rendered("<b>bold</b>\n\n<div>\n\n[a]: http://b") == "<b>bold</b>\n\n<div>\n\n[a]: http://b"


def test_rich_markup_and_emoji_codes_are_text() -> None:
    assert rendered("[red]x[/red] :smile:") == "[red]x[/red] :smile:"


def test_emphasis_is_style_only() -> None:
    assert rendered("**a** *b* ~~c~~ `d`") == "a b c d"
    assert "\x1b[1m" in rendered("**a**", colour=True)


def test_ascii_terminals_get_ascii() -> None:
    assert rendered("- a\n\n> b\n\n---\n\n```\nc\n```", ascii_only=True).isascii()


def test_wide_characters_wrap_by_columns() -> None:
    assert rendered("漢字漢字漢字", width=6) == "漢字漢\n字漢字"


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30), st.integers(4, 40))
def test_words_survive_at_any_width(word: str, width: int) -> None:
    assert word in "".join(rendered(word, width=width).split("\n"))


@settings(max_examples=150, deadline=None)
@given(st.text("ab*_`[]()<>#-|>\n 1.~!", max_size=60), st.integers(1, 30))
def test_any_text_renders(source: str, width: int) -> None:
    rendered(source, width=width)
