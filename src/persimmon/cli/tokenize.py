"""`persimmon tokenize`: the ids and pieces of a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from persimmon.cli.options import add_model_argument, given_text, model_name

if TYPE_CHECKING:
    from persimmon.tokenizer import Tokenizer

HELP = "show the token ids and pieces of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_argument(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="TEXT", help="the text; - reads standard input (default: -)")
    text.add_argument("--file", metavar="FILE", help="file with the text, UTF-8; - reads standard input")
    parser.add_argument("--bos", action="store_true", help="put the end-of-text piece in front, as models get it")
    parser.add_argument("--json", action="store_true", help="print ids, pieces and sizes as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import note

    text = read_text(args)
    tokenizer = load_tokenizer(model_name(args))
    ids = tokenizer.encode(text, bos=args.bos)
    size = len(text.encode())
    if args.json:
        pieces = [tokenizer.piece(token_id) for token_id in ids]
        facts = {"model": model_name(args), "tokens": len(ids), "bytes": size, "ids": ids, "pieces": pieces}
        print(json.dumps(facts, ensure_ascii=False))  # one line: indented, every id would have its own
        return 0
    print("\n".join([f"{'id':>7}  piece", *(f"{token_id:>7}  {tokenizer.piece(token_id)!r}" for token_id in ids)]))
    each = f", {size / len(ids):.2f} bytes each" if ids else ""
    note(f"{len(ids)} tokens for {size} bytes{each}")
    return 0


def read_text(args: argparse.Namespace) -> str:
    """The text of --text or --file; standard input for `-` and, unless it is a terminal, without either."""
    return given_text("text", ("--text", args.text), ("--file", args.file))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model directory, a tokenizer file, a hub id or a shipped model; weights are not needed."""
    from persimmon.checkpoints.download import resolve
    from persimmon.tokenizer import Tokenizer

    path = Path(name).expanduser()
    return Tokenizer.load(path if path.is_file() else resolve(name, weights=False))
