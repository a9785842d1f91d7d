"""`persimmon tokenizer train`: a vocabulary from text."""

from __future__ import annotations

import argparse

HELP = "train a vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="tokenizer_verb", required=True, metavar="train")
    train = verbs.add_parser("train", help="train a unigram vocabulary with byte fallback", description=HELP)
    train.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="documents: .txt, or .jsonl and .jsonl.gz with one `text` per line",
    )  # fmt: skip
    train.add_argument("--output", required=True, metavar="DIR", help="directory for the tokenizer's files")
    train.add_argument("--vocab-size", type=int, default=8_192, metavar="N", help="pieces (default: 8192)")
    train.add_argument(
        "--characters", type=int, default=12_000_000, metavar="N",
        help="characters to train on, drawn from all documents (default: 12000000)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, default=0, metavar="N", help="which characters are drawn (default: 0)")
    train.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the trainer (default: 2)")
    train.add_argument("--quiet", action="store_true", help="no progress on stderr")
    train.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    import dataclasses

    from persimmon.cli.console import note, print_json
    from persimmon.data.vocabulary import train_from_files

    report = train_from_files(
        args.input, args.output, vocab_size=args.vocab_size, characters=args.characters, seed=args.seed,
        threads=args.threads, report=lambda line: note(line, quiet=args.quiet),
    )  # fmt: skip
    if args.json:
        print_json({"output": args.output, **dataclasses.asdict(report)})
    else:
        print(
            f"{args.output}: {report.vocab_size:,} pieces, {report.bytes_per_token:.2f} bytes per token on the "
            f"training text, {report.single_byte_share:.2%} of the tokens are single bytes, {report.seconds:.0f} s"
        )
    return 0
