"""`persimmon export`: a model as a directory that transformers and others read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from persimmon.cli.import_ import add_writing_options, describe, print_summary, shard_bytes, verify
from persimmon.cli.options import checked_source

HELP = "write a model as a directory that transformers reads"

_DTYPES = ("auto", "bfloat16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or name")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="element type (default: auto, as it is)")
    parser.add_argument("--verify", action="store_true", help="read OUT back and compare it with MODEL bit for bit")
    add_writing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.checkpoints.convert import write_copy
    from persimmon.checkpoints.directory import open_directory
    from persimmon.checkpoints.download import resolve
    from persimmon.checkpoints.staging import check_target
    from persimmon.cli.console import Progress, note, print_json

    target = Path(args.out)
    check_target(target, overwrite=args.force)
    opened = open_directory(checked_source(resolve(args.model), quiet=args.quiet))
    dtype = None
    if args.dtype != "auto":
        import torch

        dtype = getattr(torch, args.dtype)
    with Progress("writing", quiet=args.quiet) as progress:
        tensors, notes = write_copy(
            opened, target, dtype=dtype, max_shard_bytes=shard_bytes(args), progress=progress
        )  # fmt: skip
    for line in notes:
        note(f"note: {line}", quiet=args.quiet)
    facts: dict[str, Any] = {"source": str(opened.path), "notes": notes}
    if args.verify:
        facts["verified_tensors"] = verify(tensors, target, quiet=args.quiet)
    facts |= describe(target)
    if args.json:
        print_json(facts)
    else:
        print_summary("exported", facts)
    return 0
