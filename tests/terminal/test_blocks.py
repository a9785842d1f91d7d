import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.terminal.blocks import BlockSplitter, parser

DOCUMENT = """# Title
First paragraph
in two lines.

- one
- two

  still two
- three

```python
x = 1

y = 2
```
After the code.

> quoted

| a | b |
|---|---|
| 1 | 2 |

    indented

    still
Last
"""
FRAGMENTS = [
    "a",
    "- x",
    "1. y",
    "\n",
    "\n\n",
    "```",
    "```py\n",
    "> ",
    "| a |\n|---|\n",
    "# ",
    "    ",
    "---",
    "==",
    " ",
    "*b*",
]


def split(pieces: list[str]) -> list[str]:
    splitter = BlockSplitter()
    blocks = [block for piece in pieces for block in splitter.add(piece)]
    return [*blocks, splitter.open.strip("\n")] if splitter.open.strip() else blocks


def kinds(source: str) -> list[str]:
    """Types and contents of everything in a document, but where it stands."""
    return [f"{token.level} {token.type} {token.content.strip()}" for token in parser().parse(source)]


def test_blocks_of_a_document() -> None:
    blocks = split([DOCUMENT])
    assert [block.split("\n")[0] for block in blocks] == [
        "# Title", "First paragraph", "- one", "```python", "After the code.", "> quoted", "| a | b |", "    indented",
        "Last",
    ]  # fmt: skip


def test_a_block_is_given_once_it_is_over() -> None:
    splitter = BlockSplitter()
    assert splitter.add("Hello\n") == []
    assert splitter.add("there.\n\n") == ["Hello\nthere."]
    assert splitter.open == ""
    assert splitter.add("- item\n\n") == []  # the list may go on
    assert splitter.add("- item\n\nafter\n") == ["- item\n\n- item"]
    assert splitter.open == "after\n"


def test_code_stays_open_until_its_fence() -> None:
    splitter = BlockSplitter()
    assert splitter.add("```\na\n\n# b\n\n- c\n\n") == []
    assert splitter.add("```\nafter\n\n") == ["```\na\n\n# b\n\n- c\n\n```", "after"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same_blocks(size: int) -> None:
    assert split([DOCUMENT[i : i + size] for i in range(0, len(DOCUMENT), size)]) == split([DOCUMENT])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.integers(1, 5))
def test_blocks_mean_what_the_document_means(fragments: list[str], size: int) -> None:
    source = "".join(fragments)
    blocks = split([source[i : i + size] for i in range(0, len(source), size)])
    assert [kind for block in blocks for kind in kinds(block)] == kinds(source)
