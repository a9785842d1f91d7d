"""`persimmon synthesize`: random weights of a real size, for benchmarks and memory planning."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from persimmon.cli.quantize import add_format_options, describe_packed, show_packed

HELP = "write a random model for benchmarks, with a chosen share of active neurons"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("out", metavar="OUT", help="directory to write; an interrupted run goes on where it stopped")
    parser.add_argument("--preset", default="8b", metavar="NAME", help="shape of the model (default: 8b)")
    parser.add_argument("--layers", type=int, metavar="N", help="another number of layers than the preset's")
    parser.add_argument(
        "--active",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of MLP neurons that are not zero (default: 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights (default: 0)")
    add_format_options(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import Progress, note, print_json
    from persimmon.config import preset
    from persimmon.fast.cpu.synthesize import synthesize
    from persimmon.machine import check_threads

    check_threads(args.threads)
    config = preset(args.preset, **({} if args.layers is None else {"num_layers": args.layers}))
    target = Path(args.out)
    with Progress("writing", quiet=args.quiet) as progress:
        synthesize(
            config, target, args.format, active=args.active, seed=args.seed, threads=args.threads, progress=progress
        )
    facts: dict[str, Any] = {**describe_packed(target), "active": args.active, "seed": args.seed}
    note("note: random weights and no tokenizer: for measurements, not for text", quiet=args.quiet)
    if args.json:
        print_json(facts)
    else:
        show_packed("synthesized", facts)
    return 0
