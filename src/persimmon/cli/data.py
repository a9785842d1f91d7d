"""`persimmon data prepare|inspect`: documents to token stores, and what is in them."""

from __future__ import annotations

import argparse

HELP = "prepare training data, or inspect prepared data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="prepare|inspect")
    prepare = verbs.add_parser("prepare", help="tokenize the documents of a recipe")
    prepare.add_argument("recipe", metavar="RECIPE", help="YAML file (see configs/mini-data.yaml)")
    prepare.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, e.g. root=DIR",
    )
    prepare.add_argument("--json", action="store_true", help="print the manifest as JSON")
    inspect = verbs.add_parser("inspect", help="documents, tokens and bytes of prepared data")
    inspect.add_argument("directory", metavar="DIR", help="output of `data prepare`")
    inspect.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    import json
    import sys
    from pathlib import Path

    from persimmon.data.prepare import DataRecipe, prepare
    from persimmon.data.tokens import TokenStore, read_manifest
    from persimmon.train.recipe import load_recipe

    if args.data_verb == "prepare":
        recipe = load_recipe(DataRecipe, args.recipe, args.overrides)
        manifest = prepare(recipe, lambda line: print(line, file=sys.stderr, flush=True))
    else:
        directory = Path(args.directory)
        manifest = read_manifest(directory)
        for name in manifest["sources"]:
            TokenStore(directory, name).verify()
    if args.json:
        print(json.dumps(manifest, indent=2))
    else:
        _print_table(manifest)
    return 0


def _print_table(manifest: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    sources: dict[str, dict[str, float]] = manifest["sources"]  # type: ignore[assignment]
    table = Table(title=f"vocabulary of {manifest['vocab_size']} pieces")
    for column in ("source", "documents", "tokens", "bytes", "bytes per token", "share of training"):
        table.add_column(column, justify="left" if column == "source" else "right")
    total = sum(facts["weight"] for facts in sources.values())
    for name, facts in sources.items():
        ratio, share = facts["bytes"] / max(1, facts["tokens"]), facts["weight"] / total
        row = (facts["documents"], facts["tokens"], facts["bytes"])
        table.add_row(name, *(f"{value:,}" for value in row), f"{ratio:.2f}", f"{share:.0%}")
    Console().print(table)
