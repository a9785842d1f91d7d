"""`persimmon tokenizer train`: a vocabulary from text."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from persimmon.cli.options import add_verb

if TYPE_CHECKING:
    from persimmon.data.learn import VocabularyReport

HELP = "train a vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="tokenizer_verb", required=True, metavar="train")
    train = add_verb(verbs, "train", "train a unigram vocabulary with byte fallback")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input", nargs="+", metavar="FILE",
        help="documents: .txt, .jsonl with one `text` per line (both plain, .gz or .zst) or .parquet",
    )  # fmt: skip
    what.add_argument(
        "--recipe", metavar="RECIPE",
        help="data recipe: its filtered documents, sampled by its weights; size, sample and seed are the recipe's",
    )  # fmt: skip
    train.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change one setting of the recipe, e.g. vocabulary.size=32000",
    )  # fmt: skip
    train.add_argument("--output", required=True, metavar="DIR", help="directory for the tokenizer's files")
    train.add_argument("--vocab-size", type=int, metavar="N", help="pieces (default: 8192)")
    train.add_argument(
        "--characters", type=int, metavar="N",
        help="characters to train on, drawn from all documents (default: 12000000)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, metavar="N", help="which characters are drawn (default: 0)")
    train.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the trainer (default: 2)")
    train.add_argument("--quiet", action="store_true", help="no progress on stderr")
    train.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    import dataclasses

    from persimmon.cli.console import note, print_json

    report = _train(args, lambda line: note(line, quiet=args.quiet))
    if args.json:
        print_json({"output": args.output, **dataclasses.asdict(report)})
    else:
        _print_report(args.output, report)
    return 0


def _train(args: argparse.Namespace, note: Callable[[str], None]) -> VocabularyReport:
    from persimmon.data.learn import train_from_files, train_from_recipe
    from persimmon.data.recipe import DataRecipe
    from persimmon.errors import InputError
    from persimmon.train.recipe import load_recipe

    given = {"--vocab-size": args.vocab_size, "--characters": args.characters, "--seed": args.seed}
    if args.recipe is None:
        if args.overrides:
            raise InputError("--set changes a recipe; give one with --recipe")
        return train_from_files(
            args.input, args.output,
            vocab_size=8_192 if args.vocab_size is None else args.vocab_size,
            characters=12_000_000 if args.characters is None else args.characters,
            seed=args.seed or 0, threads=args.threads, report=note,
        )  # fmt: skip
    if named := [flag for flag, value in given.items() if value is not None]:
        raise InputError(f"{named[0]} does not go with --recipe; use --set vocabulary.size=N and the like")
    recipe = load_recipe(DataRecipe, args.recipe, args.overrides)
    return train_from_recipe(recipe, args.output, threads=args.threads, report=note)


def _print_report(output: str, report: VocabularyReport) -> None:
    from rich.console import Console
    from rich.table import Table

    print(
        f"{output}: {report.vocab_size:,} pieces ({report.pieces_used:,} of them occur), {report.bytes_per_token:.2f} "
        f"bytes per token on the training text, {report.single_byte_share:.2%} of the tokens are single bytes, "
        f"{report.seconds:.0f} s"
    )
    table = Table()
    for column in ("source", "text", "bytes", "tokens", "bytes per token", "single bytes"):
        table.add_column(column, justify="left" if column in ("source", "text") else "right")
    for kind, entries in (("sample", report.sample), ("held out", report.held_out)):
        for name, entry in entries.items():
            ratio, spelled = f"{entry.bytes_per_token:.2f}", f"{entry.single_byte_share:.2%}"
            table.add_row(name, kind, f"{entry.bytes:,}", f"{entry.tokens:,}", ratio, spelled)
    Console().print(table)
