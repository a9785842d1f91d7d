"""Rows as a Markdown table and as figures; and the places in pages that quote them. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persimmon.bench.row import Row, check_row
from persimmon.errors import InputError, NotFoundError
from persimmon.figures import load_pyplot, save_figure
from persimmon.machine import size_text

BEGIN, END = "<!-- benchmark rows -->", "<!-- end of benchmark rows -->"
"""What stands between them in a page is written by `persimmon bench report --page`."""

NO_ROWS = "No rows yet."

_COLUMNS = (
    "row",
    "model",
    "format",
    "context",
    "tokens/s",
    "of the ceiling",
    "read per token",
    "peer",
    "ratio",
    "memory",
)


def read_rows(places: Sequence[Path]) -> dict[str, Row]:
    """{name: row} of JSON files and of the folders that hold them; other documents there are passed over.

    Raises NotFoundError for a place that does not exist, InputError for a file that is no JSON or a broken row.
    """
    rows: dict[str, Row] = {}
    for file in _files(places):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            raise InputError(f"{file} is not JSON: {error}") from None
        if isinstance(document, dict) and "bench" in document:
            try:
                check_row(document)
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            rows[file.stem] = document
    return rows


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(place.glob("*.json"))
        elif place.is_file():
            yield place
        else:
            raise NotFoundError(f"no benchmark rows at {place}")


def table(rows: Mapping[str, Row]) -> str:
    """A Markdown table, one line per row."""
    if not rows:
        return NO_ROWS
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cells(name, row))} |" for name, row in rows.items()]
    return "\n".join(lines)


def _cells(name: str, row: Row) -> list[str]:
    peer, read = row.get("peer", {}), row["bytes_per_token"]
    ratio = f"**{row['ratio']:.2f}** ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})" if "ratio" in row else ""
    return [
        name,
        row["model"],
        row["format"],
        f"{row['context']:,}",
        number(row["tokens_per_second"]),
        f"{row['percent_of_ceiling']:.0f} %",
        "" if read is None else f"{size_text(read)} of {size_text(row['bytes_per_token_dense'])}",
        peer.get("name", ""),
        ratio,
        size_text(row["peak_rss_bytes"]) if row["peak_rss_bytes"] else "",
    ]


def number(value: float) -> str:
    """Three digits: `6.52`, `88.1`, `1,930`."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def summary(row: Row) -> list[str]:
    """A row for a person, in lines."""
    unit = "layers/s" if row["bench"] == "kernels" else "tokens/s"
    most, percent = number(row["ceiling_tokens_per_second"]), row["percent_of_ceiling"]
    lines = [f"achieved: {number(row['tokens_per_second'])} {unit}, {percent:.0f} % of the ceiling of {most}"]
    if row["bytes_per_token"] is not None:
        read, dense = size_text(row["bytes_per_token"]), size_text(row["bytes_per_token_dense"])
        lines.append(f"read per token: {read} (dense: {dense})")
    for entry in row.get("kernels", ()):
        share = f" at {entry['active_share']:.0%} active" if "active_share" in entry else ""
        lines.append(
            f"  {entry['kernel']}{share}: {entry['microseconds']:.0f} us, {entry['gb_s']:.1f} GB/s, "
            f"{entry['percent_of_bandwidth']:.0f} % of bandwidth"
        )
    for entry in row.get("lengths", ()) or row.get("levels", ()):
        what = f"{entry['clients']} clients" if "clients" in entry else f"{entry['context']} tokens"
        lines.append(f"  {what}: {number(entry['tokens_per_second'])} tokens/s")
    if "ratio" in row:
        low, high, name = row["ratio_min"], row["ratio_max"], row["peer"]["name"]
        lines.append(f"against {name}: {row['ratio']:.2f}x (pairs {low:.2f}-{high:.2f})")
    if "startup_seconds" in row:
        lines.append(f"start to first token: {row['startup_seconds']:.2f} s")
    return [*lines, f"peak memory: {size_text(row['peak_rss_bytes'])}"]


# -- pages ---------------------------------------------------------------------------------------------------


def with_rows(page: str, rows: Mapping[str, Row]) -> str:
    """The page with the table between its marks. Raises InputError for a page without them."""
    return between(page, BEGIN, END, table(rows))


def between(page: str, begin: str, end: str, body: str) -> str:
    """The page with `body` between two marks. Raises InputError for a page without them."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"the page has no place for the rows: {begin} ... {end}")
    return f"{before}{begin}\n{body}\n{end}{after}"


_QUOTE = re.compile(r"\[([^\]]+)\]\(([^)\s]*benchmarks/results/[\w.-]+\.json)\s+\"([\w.]+)\"\)")


def quotes(page: str) -> list[tuple[str, str, str]]:
    """(text, file, field) of every figure that links to its row: `[2.1x](benchmarks/results/a.json "ratio")`."""
    return [(text, name, field) for text, name, field in _QUOTE.findall(page)]


def quote_holds(text: str, value: float) -> bool:
    """Whether the first number of the text is the value, rounded to the digits that the text has."""
    found = re.search(r"\d[\d,]*(?:\.(\d+))?", text)
    if found is None:
        return False
    digits = len(found[1] or "")
    quoted = float(found[0].replace(",", ""))
    return abs(quoted - value) <= 0.5 * 10.0**-digits + 1e-9 * abs(value)


def field_of(row: Row, path: str) -> float:
    """A number of a row by its path, as `peer.tokens_per_second`. Raises InputError when there is none."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, (int, float)):
        raise InputError(f"the row has no number {path!r}")
    return float(value)


# -- figures -------------------------------------------------------------------------------------------------


def figure(rows: Mapping[str, Row], picture: Path) -> None:
    """Draw the rows: kernels as time over active share, everything else as bars beside the ceiling and the peer.

    Raises UnavailableError without matplotlib, InputError without rows.
    """
    if not rows:
        raise InputError("there are no rows to draw")
    pyplot = load_pyplot("train")
    kernels = [row for row in rows.values() if row["bench"] == "kernels"]
    height = 4.0 if kernels else 1.2 + 0.5 * len(rows)
    drawing, axis = pyplot.subplots(figsize=(8, height), constrained_layout=True)
    (_draw_kernels(axis, kernels[0]) if kernels else _draw_bars(axis, rows))
    save_figure(drawing, picture, dpi=140)
    pyplot.close(drawing)


def _draw_bars(axis: Any, rows: Mapping[str, Row]) -> None:
    """Percent of each row's ceiling, ours and the peer's."""
    places = range(len(rows))
    ours = [row["percent_of_ceiling"] for row in rows.values()]
    peers = [
        100 * row.get("peer", {}).get("tokens_per_second", 0.0) / row["ceiling_tokens_per_second"]
        for row in rows.values()
    ]
    axis.barh([place - 0.2 for place in places], ours, 0.38, color="#c2410c", label="persimmon")
    axis.barh([place + 0.2 for place in places], peers, 0.38, color="#a8a29e", label="peer")
    axis.axvline(100, color="#1c1917", linewidth=1)
    axis.set_yticks(list(places), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("percent of what the machine's bandwidth or arithmetic allows for the bytes we read")
    axis.legend(frameon=False, fontsize=9)


def _draw_kernels(axis: Any, row: Row) -> None:
    """Microseconds of an MLP over the share of active neurons, by format."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in row["kernels"]:
        if "active_share" in entry:
            lines.setdefault(entry["kernel"], []).append((100 * entry["active_share"], entry["microseconds"]))
    for name, points in lines.items():
        if len(points) == 1:  # dense: the share makes no difference
            axis.axhline(points[0][1], linestyle="--", color="#1c1917", label=f"{name} (dense)")
        else:
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    axis.set(xlabel="percent of the neurons active", ylabel="microseconds per token and layer", ylim=(0, None))
    axis.set_title(f"MLP of {row['model']}, {row['threads']} threads")
    axis.legend(frameon=False, fontsize=9)
