"""`persimmon quantize`: a model directory becomes a smaller one for the CPU engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persimmon.fast.cpu.fidelity import Fidelity

HELP = "write a model in fewer bits for the CPU engine, and measure what that costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or name, in bfloat16 or float32")
    parser.add_argument("out", metavar="OUT", help="directory to write; an interrupted run goes on where it stopped")
    add_format_options(parser)
    parser.add_argument(
        "--report", metavar="FILE", help="compare both models on a text: perplexity, KL divergence, equal top tokens"
    )


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that writes packed weights."""
    parser.add_argument(
        "--format", default="p44", metavar="NAME",
        help="q8 (int8), q4 (int4) or p44 (int8 MLP that skips its zeros, int4 attention) (default: p44)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.checkpoints.download import resolve
    from persimmon.cli.console import Progress, print_json
    from persimmon.cli.options import checked_source, read_text
    from persimmon.fast.cpu.quantize import quantize
    from persimmon.machine import check_threads

    check_threads(args.threads)
    text = read_text(args.report) if args.report else None  # first, so that a wrong name costs nothing
    source, target = checked_source(resolve(args.model), quiet=args.quiet), Path(args.out)
    with Progress("packing", quiet=args.quiet) as progress:
        quantize(source, target, args.format, threads=args.threads, progress=progress)
    facts: dict[str, Any] = {**describe_packed(target), "source_bytes": _source_bytes(source)}
    if text is not None:
        facts["report"] = _facts(_measure(args, source, target, text))
    if args.json:
        print_json(facts)
    else:
        _show(facts)
    return 0


def describe_packed(target: Path) -> dict[str, Any]:
    """What a packed directory holds."""
    from persimmon.accounting import count_parameters
    from persimmon.fast.cpu.packed import open_packed

    opened = open_packed(target)
    return {
        "directory": str(target),
        "format": opened.form.name,
        "parameters": count_parameters(opened.config).total,
        "weight_bytes": sum((target / name).stat().st_size for name in opened.fingerprints),
    }


def show_packed(done: str, facts: dict[str, Any]) -> None:
    """The two lines that say what was written."""
    from persimmon.cli.info import size

    bits = 8 * facts["weight_bytes"] / facts["parameters"]
    print(f"{done} to {facts['directory']}")
    print(
        f"  {facts['parameters']:,} parameters, {facts['format']}, {size(facts['weight_bytes'])} ({bits:.2f} bits each)"
    )


def _source_bytes(source: Path) -> int:
    from persimmon.checkpoints.directory import open_directory

    return sum(file.stat().st_size for file in {tensor.file for tensor in open_directory(source).tensors.values()})


def _measure(args: argparse.Namespace, source: Path, target: Path, text: str) -> Fidelity:
    from persimmon.cli.console import Progress
    from persimmon.fast.cpu.fidelity import compare
    from persimmon.fast.cpu.load import load_decoder
    from persimmon.tokenizer import Tokenizer

    token_ids = Tokenizer.load(source).encode(text, bos=True)
    decoders = [load_decoder(directory, threads=args.threads) for directory in (source, target)]
    with Progress("comparing", quiet=args.quiet) as progress:
        return compare(decoders[0], decoders[1], token_ids, progress)


def _facts(fidelity: Fidelity) -> dict[str, Any]:
    import dataclasses

    return {**dataclasses.asdict(fidelity), "perplexity_change": fidelity.perplexity_change}


def _show(facts: dict[str, Any]) -> None:
    from persimmon.cli.info import size

    show_packed("quantized", facts)
    print(f"  {facts['weight_bytes'] / facts['source_bytes']:.0%} of the source's {size(facts['source_bytes'])}")
    if "report" in facts:
        report = facts["report"]
        print(f"  against the source on {report['tokens']:,} tokens:")
        change = f"{report['perplexity_change']:+.2%}"
        print(f"    perplexity        {report['perplexity']:.4g} ({change}; source {report['source_perplexity']:.4g})")
        print(f"    KL divergence     {report['kl']:.2g} nats per token")
        print(f"    same top token    {report['top1_agreement']:.2%}")
