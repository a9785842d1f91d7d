"""Markdown as rich renderables: quiet, without boxes, and nothing that was written is left out.

Line ends inside paragraphs are kept, as chat models mean them. Code stands at the left edge between two thin rules, so
that it can be copied as it is.
"""

from __future__ import annotations

from markdown_it.tree import SyntaxTreeNode
from pygments.token import Comment, Keyword, Name, Number, Operator, String  # type: ignore[import-untyped]
from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text

from persimmon.terminal.blocks import parser

# The terminal's own colours, which its owner made readable on its background.
_CODE_THEME = ANSISyntaxTheme(
    {
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="magenta"),
        Operator.Word: Style(color="magenta"),
        Name.Function: Style(color="blue"),
        Name.Class: Style(color="blue", bold=True),
        Name.Decorator: Style(color="blue"),
        Number: Style(color="cyan"),
        String: Style(color="green"),
    }
)
_JUSTIFY: dict[str, JustifyMethod] = {"left": "left", "center": "center", "right": "right"}
_INLINE_STYLES = {"strong": "bold", "em": "italic", "s": "strike"}


class Prefixed:
    """A renderable with a text before its first line and another before the following ones."""

    def __init__(self, first: Text, rest: Text, body: RenderableType) -> None:
        self._first, self._rest, self._body = first, rest, body

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the body, narrowed by the width of the prefix."""
        narrow = options.update(width=max(1, options.max_width - self._first.cell_len))
        prefix = self._first
        for line in console.render_lines(self._body, narrow, pad=False):
            yield from prefix.render(console)
            yield from line
            yield Segment.line()
            prefix = self._rest


def render_markdown(source: str, *, ascii_only: bool = False) -> RenderableType:
    """The blocks of `source`, one blank line between them."""
    return _Renderer(ascii_only).blocks(SyntaxTreeNode(parser().parse(source)).children)


class _Renderer:
    """One method per kind of block; inline text is one walk over the tree."""

    def __init__(self, ascii_only: bool) -> None:
        self._bullet, self._quote, self._line = ("* ", "| ", "-") if ascii_only else ("• ", "│ ", "─")

    def blocks(self, nodes: list[SyntaxTreeNode], *, tight: bool = False) -> RenderableType:
        """Blocks below each other, with blank lines between them unless `tight`."""
        parts: list[RenderableType] = []
        for node in nodes:
            parts += [Text()] if parts and not tight else []
            parts.append(self.block(node))
        return Group(*parts)

    def block(self, node: SyntaxTreeNode) -> RenderableType:
        """One block of any kind."""
        match node.type:
            case "heading":
                text = self.inline(node.children)
                text.stylize("heading")
                return text
            case "fence" | "code_block":
                return self.code(node)
            case "bullet_list" | "ordered_list":
                return self.items(node)
            case "blockquote":
                mark = Text(self._quote, "faint")
                return Prefixed(mark, mark, self.blocks(node.children))
            case "table":
                return self.table(node)
            case "hr":
                return Rule(characters=self._line, style="faint")
            case _:
                return self.inline(node.children)

    def code(self, node: SyntaxTreeNode) -> RenderableType:
        """Highlighted code, its language in the upper rule."""
        language = node.info.split()[0] if node.info.strip() else ""
        code = Syntax("", language or "text", theme=_CODE_THEME).highlight(node.content)
        code.rstrip()
        code.no_wrap, code.overflow, code.tab_size = False, "fold", 4
        top = Rule(Text(language, "dim"), align="left", characters=self._line, style="faint")
        return Group(top, code, Rule(characters=self._line, style="faint"))

    def items(self, node: SyntaxTreeNode) -> RenderableType:
        """Items behind bullets or right-aligned numbers; loose lists keep their blank lines."""
        first = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else 0
        width = len(f"{first + len(node.children) - 1}. ") if node.type == "ordered_list" else len(self._bullet)
        tight = all(block.hidden for item in node.children for block in item.children if block.type == "paragraph")
        parts: list[RenderableType] = []
        for number, item in enumerate(node.children, first):
            marker = f"{number}. " if node.type == "ordered_list" else self._bullet
            parts += [Text()] if parts and not tight else []
            body = self.blocks(item.children, tight=tight) if item.children else Text()
            parts.append(Prefixed(Text(marker.rjust(width), "marker"), Text(" " * width), body))
        return Group(*parts)

    def table(self, node: SyntaxTreeNode) -> RenderableType:
        """Columns with a line under the heads."""
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, border_style="faint", header_style="heading"
        )
        rows = [row for part in node.children for row in part.children]
        for cell in rows[0].children:
            side = str(cell.attrs.get("style", "")).rpartition(":")[2]
            table.add_column(self.inline(cell.children), justify=_JUSTIFY.get(side, "left"), overflow="fold")
        for row in rows[1:]:
            table.add_row(*(self.inline(cell.children) for cell in row.children))
        return table

    def inline(self, nodes: list[SyntaxTreeNode]) -> Text:
        """Running text with emphasis, code and links; the address of a link is shown behind its text."""
        text = Text(overflow="fold")
        for node in nodes:
            match node.type:
                case "softbreak" | "hardbreak":
                    text.append("\n")
                case "code_inline":
                    text.append(node.content, "code")
                case "link" | "image":
                    text.append_text(self.link(node))
                case _ if node.children:
                    inner = self.inline(node.children)
                    inner.stylize(_INLINE_STYLES.get(node.type, ""))
                    text.append_text(inner)
                case _:
                    text.append(node.content)
        return text

    def link(self, node: SyntaxTreeNode) -> Text:
        """`text (address)`, or the address alone where the text is the same."""
        address = str(node.attrs.get("href", node.attrs.get("src", "")))
        text = self.inline(node.children or [])
        text.stylize("link")
        if text.plain == address:
            return text
        return text.append(f" ({address})" if text.plain else address, "dim")
