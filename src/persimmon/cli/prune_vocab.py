"""`persimmon prune-vocab`: drop the rows of embedding and head that no text uses, or put them back."""

from __future__ import annotations

import argparse
from pathlib import Path

from persimmon.cli.import_ import add_writing_options, describe, print_summary, shard_bytes
from persimmon.cli.options import checked_source

HELP = "drop unused vocabulary rows of embedding and head, exactly and reversibly"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or name")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--restore", action="store_true", help="put the dropped rows of a pruned MODEL back")
    parser.add_argument(
        "--discard", action="store_true",
        help="do not keep the dropped rows in OUT: smaller on disk, but --restore cannot undo it",
    )  # fmt: skip
    parser.add_argument(
        "--unused", metavar="REGEX", help="pieces that match as a whole are unused too, beside those marked as unused"
    )
    add_writing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.checkpoints.download import resolve
    from persimmon.checkpoints.staging import check_target
    from persimmon.checkpoints.vocabulary import prune, restore
    from persimmon.cli.console import Progress, print_json
    from persimmon.errors import InputError

    if args.restore and (args.discard or args.unused):
        raise InputError("--restore takes neither --discard nor --unused")
    target = Path(args.out)
    check_target(target, overwrite=args.force)
    source = checked_source(resolve(args.model), quiet=args.quiet)
    with Progress("writing", quiet=args.quiet) as progress:
        if args.restore:
            mapping = restore(source, target, max_shard_bytes=shard_bytes(args), progress=progress)
        else:
            mapping = prune(
                source, target, unused=args.unused, keep_dropped=not args.discard,
                max_shard_bytes=shard_bytes(args), progress=progress,
            )  # fmt: skip
    rows = {"original_rows": mapping.original_size, "kept_rows": mapping.size}
    facts = {"source": str(source), "restored": args.restore, **rows, **describe(target)}
    if args.json:
        print_json(facts)
    else:
        print_summary("restored" if args.restore else "pruned", facts)
        pruned = f"{mapping.size:,} of {mapping.original_size:,} vocabulary rows are kept"
        print(f"  {mapping.original_size:,} vocabulary rows again" if args.restore else f"  {pruned}")
    return 0
