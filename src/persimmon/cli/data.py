"""`persimmon data prepare|inspect`: documents to token stores, and what is in them."""

from __future__ import annotations

import argparse
from typing import Any

from persimmon.cli.options import add_verb

HELP = "prepare training data, or inspect prepared data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="prepare|inspect")
    prepare = add_verb(verbs, "prepare", "filter, deduplicate and tokenize the documents of a recipe")
    prepare.add_argument("recipe", metavar="RECIPE", help="YAML file (see configs/mini-data.yaml)")
    prepare.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, e.g. root=DIR",
    )
    inspect = add_verb(
        verbs, "inspect", "documents, tokens and lengths of prepared data, or the trained tokens of conversations"
    )
    inspect.add_argument("path", metavar="DIR|FILE", help="output of `data prepare`, or a .jsonl of conversations")
    inspect.add_argument("--plot", metavar="FILE", help="draw lengths and shares to this file (.png, .svg, .pdf)")
    inspect.add_argument("--no-verify", action="store_true", help="leave the checksums unchecked (sizes are checked)")
    inspect.add_argument("--model", default=None, metavar="MODEL", help="whose vocabulary conversations are shown in")
    inspect.add_argument("--limit", type=int, default=3, metavar="N", help="conversations to show (default: 3)")
    for verb in (prepare, inspect):
        verb.add_argument("--quiet", action="store_true", help="no progress on stderr")
        verb.add_argument("--json", action="store_true", help="print the manifest and its statistics as JSON")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from pathlib import Path

    if args.data_verb == "prepare":
        return _prepare(args)
    return _show_conversations(args) if Path(args.path).is_file() else _inspect(args)


def _prepare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from persimmon.cli.console import note, print_json
    from persimmon.data.inspection import inspect
    from persimmon.data.prepare import DataRecipe, prepare
    from persimmon.train.recipe import load_recipe

    recipe = load_recipe(DataRecipe, args.recipe, args.overrides)
    manifest = prepare(recipe, lambda line: note(line, quiet=args.quiet))
    if manifest is None:
        if args.json:
            print_json({"submitted": recipe.output})
    elif args.json:
        print_json(manifest)
    else:
        _print_tables(inspect(Path(recipe.output), verify=False))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pathlib import Path

    from persimmon.cli.console import note, print_json
    from persimmon.data.inspection import inspect, plot

    report = inspect(Path(args.path), verify=not args.no_verify)
    if args.plot:
        plot(report, Path(args.plot))
        note(f"wrote {args.plot}", quiet=args.quiet)
    if args.json:
        print_json(report)
    else:
        _print_tables(report)
    return 0


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    sources: dict[str, dict[str, Any]] = report["sources"]
    console = Console()
    table = Table(title=f"vocabulary of {report['vocab_size']} pieces")
    for column in ("source", "documents", "characters", "tokens", "bytes per token", "shards", "held out", "share"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, facts in sources.items():
        counts = [facts.get(key) for key in ("documents", "characters", "tokens")]
        numbers = ["-" if count is None else f"{count:,}" for count in counts]
        shards, held = len(facts.get("shards", [0])), facts.get("held_out")
        rest = (f"{facts['bytes_per_token']:.2f}", str(shards), "-" if held is None else f"{held:,}")
        table.add_row(name, *numbers, *rest, f"{facts['share_of_training']:.0%}")
    console.print(table)
    console.print(_lengths_table(sources))
    for name, facts in sources.items():
        if facts.get("dropped"):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
            console.print(f"{name}: {facts['read']['documents']:,} documents read; dropped: {reasons}", highlight=False)


def _lengths_table(sources: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    from persimmon.data.inspection import LONG

    table = Table(title="tokens of a document, and the share of a source's tokens in long ones")
    columns = ("source", "10 %", "median", "90 %", "99 %", "longest", *(f"≥ {limit:,}" for limit in LONG))
    for column in columns:
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, facts in sources.items():
        lengths = facts["lengths"]
        marks = [f"{value:,}" for value in lengths["percentiles"].values()] or ["-"] * 4
        shares = [f"{mark['share_of_tokens']:.0%}" for mark in lengths["long"]] or ["-"] * len(LONG)
        table.add_row(name, *marks, f"{lengths['longest']:,}", *shares)
    return table


def _show_conversations(args: argparse.Namespace) -> int:
    """Conversations with their trained tokens in green, or between guillemets where there is no colour."""
    import itertools
    from pathlib import Path

    from rich.console import Console
    from rich.text import Text

    from persimmon.checkpoints import hub
    from persimmon.cli.console import print_json
    from persimmon.cli.options import model_name
    from persimmon.data.conversations import read_conversations
    from persimmon.data.inspection import trained_pieces
    from persimmon.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(hub.resolve(model_name(args)))
    console, documents = Console(highlight=False), []
    for conversation in itertools.islice(read_conversations(Path(args.path)), args.limit):
        pieces = list(trained_pieces(tokenizer, conversation))
        documents.append({"origin": conversation.origin, "pieces": [vars(piece) for piece in pieces]})
        if args.json:
            continue
        trained = sum(piece.tokens for piece in pieces if piece.trained)
        console.rule(f"{conversation.origin}: {trained} of {sum(p.tokens for p in pieces)} tokens are trained")
        for piece in pieces:
            plain = f"«{piece.text}»" if piece.trained and console.color_system is None else piece.text
            console.print(Text(plain, style="bold green" if piece.trained else "dim"), end="")
        console.print()
    if args.json:
        print_json(documents)
    return 0
