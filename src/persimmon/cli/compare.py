"""`persimmon compare`: runs next to each other and next to the published numbers, as table and figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from persimmon.atomic import write_text

if TYPE_CHECKING:
    from persimmon.evals.compare import Run

HELP = "put evaluation runs next to the published numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN",
        help="results file or directory of `persimmon eval` or lm-eval, or NAME=PATH; differences are taken from the "
        "first. Without any: the published numbers alone",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write comparison.md, .json, .png and .svg there (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no notes on stderr")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import note, print_json
    from persimmon.errors import InputError
    from persimmon.evals import compare, figure, report

    runs = [_load(text) for text in args.runs]
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise InputError(f"two runs have the same name ({', '.join(labels)}): give them as NAME=PATH")
    document, text = compare.to_json(runs), report.comparison(runs)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "comparison.json", json.dumps(document, ensure_ascii=False, indent=2) + "\n")
        write_text(args.out / "comparison.md", text)
        figure.draw(runs, [args.out / "comparison.png", args.out / "comparison.svg"])
        note(f"comparison.md, .json, .png and .svg in {args.out}", quiet=args.quiet)
    if args.json:
        print_json(document)
    else:
        print(text, end="")
    return 0


def _load(text: str) -> Run:
    """NAME=PATH, or a path."""
    from persimmon.evals import compare

    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return compare.load(Path(path), name)
    return compare.load(Path(text))
