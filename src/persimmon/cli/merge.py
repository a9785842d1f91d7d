"""`persimmon merge`: a model and an adapter become one model directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from persimmon.cli.import_ import add_writing_options, describe, print_summary, shard_bytes
from persimmon.cli.options import checked_source

HELP = "merge an adapter into its model, as a directory that everything reads"

_DTYPES = ("auto", "bfloat16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="the adapter's base: directory, hub id or name, not quantized")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of the adapter (PEFT's form)")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="element type (default: auto, the model's); float32 rounds least",
    )
    add_writing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    import torch

    from persimmon.checkpoints.download import resolve
    from persimmon.checkpoints.merging import merge
    from persimmon.checkpoints.staging import check_target
    from persimmon.cli.console import Progress, note, print_json
    from persimmon.errors import InputError
    from persimmon.fast.cpu.packed import is_packed

    target, model = Path(args.out), resolve(args.model)
    check_target(target, overwrite=args.force)
    if is_packed(model):
        raise InputError(f"{model} is quantized; merge into the model it was made from, then quantize the result")
    checked_source(model, quiet=args.quiet)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with Progress("merging", quiet=args.quiet) as progress:
        _, adapter, notes = merge(
            model, Path(args.adapter), target, dtype=dtype, max_shard_bytes=shard_bytes(args), progress=progress
        )
    for line in notes:
        note(f"note: {line}", quiet=args.quiet)
    facts: dict[str, Any] = {
        "source": str(model),
        "adapter": str(adapter.path),
        "adapter_parameters": adapter.num_parameters,
        "notes": notes,
        **describe(target),
    }
    if args.json:
        print_json(facts)
    else:
        print_summary("merged", facts)
        print(f"  adapter of rank {adapter.settings.rank} on {', '.join(adapter.settings.targets)}")
    return 0
