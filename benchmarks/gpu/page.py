"""Write what was measured on GPUs into a page: `python benchmarks/gpu/page.py benchmarks/gpu/results docs/gpu.md`.

The tables stand between two marks; a test holds the page to the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persimmon.bench.report import between

BEGIN, END = "<!-- measured on GPUs: benchmarks/gpu/page.py -->", "<!-- end -->"

GIB = 1 << 30

Rows = list[dict[str, Any]]


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Markdown of one report, section by section."""
    names = ("ceilings", "decode", "pairs", "prefill", "quality", "baselines", "memory")
    sections: dict[str, Rows] = {name: [] for name in names}
    for name, section in report["sections"].items():
        sections[name] = [row for row in section["rows"] if "error" not in row and "skipped" not in row]
    device = report["device"]
    ceilings = {row["what"]: row for row in sections["ceilings"]}
    yield (
        f"**{device['name']}**, {report['layers']} layers of the {report['shape']} shape, {report['active']:.0%} of "
        f"neurons active (PyTorch {device['torch']}, Triton {device['triton']}, CUDA {device['cuda']}); "
        f"copy bandwidth {ceilings['copy']['gb_s']:,.0f} GB/s, matrix products "
        f"{ceilings['matmul']['tflop_s']:,.0f} TFLOP/s in bfloat16.\n"
    )
    yield markdown(
        (
            "weights",
            "cache",
            "sequences",
            "context",
            "tokens/s",
            "ms a step",
            "GB a step",
            "of the copy bandwidth",
            "MLP",
        ),
        (decode_cells(row) for row in ordered(sections["decode"], report["formats"])),
    )
    yield markdown(
        ("weights", "tokens/s dense", "sparse", "ratio", "ids"),
        (
            (row["format"], f"{row['dense_tokens_per_second']:.0f}", f"{row['sparse_tokens_per_second']:.0f}",
             f"{row['ratio']:.2f}", "equal" if row["equal_ids"] else "part at a tie")
            for row in sections["pairs"]
        ),
    )  # fmt: skip
    yield markdown(
        ("weights", "prompt", "tokens/s", "TFLOP/s", "of the matrix rate"),
        (
            (row["format"], f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}", f"{row['tflop_s']:.0f}",
             f"{row['percent_of_matmul_peak']:.0f} %")
            for row in sections["prefill"]
        ),
    )  # fmt: skip
    yield markdown(("weights", "mean KL, nats", "largest error"), quality_cells(sections["quality"]))
    if sections["baselines"]:
        yield markdown(
            ("beside it, bfloat16", "sequences", "tokens/s", "this engine", "ratio"),
            baseline_cells(sections["baselines"], sections["decode"]),
        )
    if sections["memory"]:
        yield markdown(("weights", "cache", "context", "planned, GiB", "at the peak"), memory_cells(sections["memory"]))


def ordered(rows: Rows, formats: Sequence[str]) -> Rows:
    """Rows of decoding by format, context and batch, whenever they were measured."""
    return sorted(rows, key=lambda row: (formats.index(row["format"]), row["context"], row["batch"]))


def decode_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table of decoding."""
    return (
        row["format"], row["kv_dtype"], str(row["batch"]), f"{row['context']:,}", f"{row['tokens_per_second']:,.0f}",
        f"{row['milliseconds_per_step']:.2f}", f"{row['bytes_per_step'] / 1e9:.1f}",
        f"{row['percent_of_ceiling']:.0f} %", "sparse" if row["sparse_mlp"] else "dense",
    )  # fmt: skip


def quality_cells(rows: Rows) -> Iterator[tuple[str, ...]]:
    """Lines of the table of errors."""
    for row in rows:
        if row["what"] == "logits":
            error = f"{row['largest_error']:.1%} of the largest logit"
            yield f"{row['format']}, {row['kv_dtype']} cache", f"{row['mean_kl']:.1e}", error
        else:
            ties = f"{row['other_ids']} of {row['ids']} greedy ids differ, all within {row['largest_gap']:.3f}"
            yield row["format"], "", f"{ties} of the best logit"


def baseline_cells(baselines: Rows, decode: Rows) -> Iterator[tuple[str, ...]]:
    """Lines of the table of other programs, each beside this engine's row of as many sequences."""
    ours = {
        row["batch"]: row["tokens_per_second"]
        for row in sorted(decode, key=lambda row: -row["context"])  # the shortest context stays
        if row["format"] == "bfloat16"
    }
    for row in baselines:
        rate, own = row["tokens_per_second"], ours[row["batch"]]
        yield row["what"], str(row["batch"]), f"{rate:,.0f}", f"{own:,.0f}", f"{own / rate:.2f}"


def memory_cells(rows: Rows) -> Iterator[tuple[str, ...]]:
    """Lines of the table of memory: the plan without its reserve, and what the allocator gave out."""
    for row in rows:
        planned, peak = row["planned_bytes"] / GIB, row["peak_bytes"] / GIB
        more = f"{peak:.2f} ({1024 * (peak - planned):+.0f} MiB)"
        yield row["format"], row["kv_dtype"], f"{row['context']:,}", f"{planned:.2f}", more


def markdown(head: Sequence[str], lines: Iterator[tuple[str, ...]]) -> str:
    """A table."""
    rows = [tuple(head), ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def with_tables(page: str, results: Path) -> str:
    """The page with the tables of every report in the folder between its marks."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    body = "\n".join(table for report in reports for table in tables(report))
    return between(page, BEGIN, END, f"\n{body}")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.write_text(with_tables(target.read_text(encoding="utf-8"), Path(sys.argv[1])), encoding="utf-8")
