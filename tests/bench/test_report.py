"""Rows as tables, the marks in pages, and figures that pages quote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench.test_row import made_row
from persimmon.bench import report
from persimmon.bench.row import finished, write
from persimmon.errors import InputError, NotFoundError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    against = {
        "ratio": 2.04, "ratio_min": 1.9, "ratio_max": 2.2,
        "peer": {"name": "llama-bench", "tokens_per_second": 3.2},
    }  # fmt: skip
    write(finished(made_row(**against)), tmp_path / "decode.json")
    write(finished(made_row(bench="train", bytes_per_token=None, tokens_per_second=1930.4)), tmp_path / "train.json")
    (tmp_path / "card.json").write_text('{"model": "mini"}')
    return tmp_path


def test_rows_become_lines_of_a_table(folder: Path) -> None:
    table = report.table(report.read_rows([folder]))
    assert table.splitlines()[2:] == [
        "| decode | tiny | p44 | 32 | 6.5 | 65 % | 2.8 GB of 7.6 GB | llama-bench | **2.04** (1.90-2.20) | 7.5 GB |",
        "| train | tiny | p44 | 32 | 1,930 | 65 % |  |  |  | 7.5 GB |",
    ]
    assert report.table({}) == report.NO_ROWS


def test_broken_rows_are_named(folder: Path) -> None:
    (folder / "bad.json").write_text('{"bench": "decode"}')
    with pytest.raises(InputError, match=r"bad\.json.*'model'"):
        report.read_rows([folder])
    (folder / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json is not JSON"):
        report.read_rows([folder])
    with pytest.raises(NotFoundError, match="nowhere"):
        report.read_rows([folder / "nowhere"])


def test_the_table_goes_between_the_marks(folder: Path) -> None:
    rows = report.read_rows([folder])
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.with_rows(page, rows)
    assert once.startswith(f"before\n{report.BEGIN}\n| row |") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once and report.with_rows(once, rows) == once
    with pytest.raises(InputError, match="no place for the rows"):
        report.with_rows("nothing", rows)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("2.0x", 2.04, True), ("2.1x", 2.04, False), ("1,930 tokens/s", 1930.4, True),
        ("1,931 tokens/s", 1930.4, False), ("about twice", 2.0, False), ("6.50", 6.5, True),
    ],
)  # fmt: skip
def test_quoted_figures_are_rounded_and_not_polished(text: str, value: float, holds: bool) -> None:
    assert report.quote_holds(text, value) is holds


def test_quotes_are_found_with_their_field() -> None:
    page = 'It is [2.0x](benchmarks/results/a.json "ratio") and [3 tokens/s](../benchmarks/results/b-1.json "peer.x").'
    assert report.quotes(page) == [
        ("2.0x", "benchmarks/results/a.json", "ratio"), ("3 tokens/s", "../benchmarks/results/b-1.json", "peer.x"),
    ]  # fmt: skip
    assert report.field_of({"peer": {"x": 3}}, "peer.x") == 3.0
    with pytest.raises(InputError, match=r"no number 'peer\.y'"):
        report.field_of({"peer": {"x": 3}}, "peer.y")


def test_every_figure_that_a_page_quotes_is_in_its_row() -> None:
    for page in PAGES:
        for text, name, field in report.quotes(page.read_text(encoding="utf-8")):
            row = json.loads((RESULTS / Path(name).name).read_text(encoding="utf-8"))
            assert report.quote_holds(text, report.field_of(row, field)), (
                f"{page.name}: {text} is not {field} of {name}"
            )


def test_tables_in_pages_are_those_of_the_rows() -> None:
    rows = report.read_rows([RESULTS])
    marked = [page for page in PAGES if report.BEGIN in page.read_text(encoding="utf-8")]
    assert marked, "no page holds the table of rows"
    for page in marked:
        text = page.read_text(encoding="utf-8")
        assert report.with_rows(text, rows) == text, f"persimmon bench report benchmarks/results --page {page.name}"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_rows_and_kernels_are_drawn(folder: Path) -> None:
    report.figure(report.read_rows([folder]), folder / "rows.png")
    kernels = [{"kernel": "MLP, q8", "microseconds": 9.0 + share, "active_share": share} for share in (0.1, 0.5)]
    kernels += [
        {"kernel": "MLP, q4", "microseconds": 8.0, "active_share": 1.0},
        {"kernel": "head", "microseconds": 1.0},
    ]
    report.figure({"kernels": finished(made_row(bench="kernels", kernels=kernels))}, folder / "kernels.png")
    for name in ("rows", "kernels"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no rows to draw"):
        report.figure({}, folder / "none.png")
