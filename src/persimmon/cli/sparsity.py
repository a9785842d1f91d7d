"""`persimmon sparsity`: the zeros of a model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persimmon.config import ModelConfig
    from persimmon.fast.sparsity import LayerSparsity

HELP = "count a model's zeros on a text: per layer, from token to token, and in bytes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or name, in bfloat16 or float32")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to read")
    parser.add_argument("--max-tokens", type=int, default=8_192, metavar="N", help="read no more (default: 8192)")
    parser.add_argument("--plot", metavar="FILE", help="draw the layers into a PNG or SVG")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import Progress, note, print_json
    from persimmon.cli.options import read_text
    from persimmon.errors import InputError
    from persimmon.fast.sparsity import measure, plot
    from persimmon.tokenizer import Tokenizer

    if args.max_tokens < 1:
        raise InputError(f"--max-tokens must be 1 or more, got {args.max_tokens}")
    text = read_text(args.text)
    if not text:
        raise InputError(f"--text {args.text} is empty")
    directory = _resolve(args.model)
    token_ids = Tokenizer.load(directory).encode(text, bos=True)[: args.max_tokens]
    model = _load(directory)
    with Progress("reading", quiet=args.quiet) as progress:
        layers = measure(model, token_ids, progress)
    facts = _facts(args.model, model.config, len(token_ids), layers)
    if args.plot:
        plot(layers, Path(args.plot), f"{args.model}: {facts['zeros']:.1%} zeros over {len(token_ids):,} tokens")
        note(f"drawn to {args.plot}", quiet=args.quiet)
    if args.json:
        print_json(facts)
    else:
        _show(facts)
    return 0


def _resolve(name: str) -> Path:
    from persimmon.checkpoints.download import resolve
    from persimmon.errors import InputError
    from persimmon.fast.cpu.packed import is_packed

    directory = resolve(name)
    if is_packed(directory):
        raise InputError(f"{name} is quantized; zeros are counted on the model that it was made from")
    return directory


def _load(directory: Path) -> Any:
    """The reference model, as precise as the memory allows."""
    import torch

    from persimmon.accounting import count_parameters
    from persimmon.checkpoints import hub
    from persimmon.checkpoints.directory import open_directory
    from persimmon.engines import choose_dtype

    opened = open_directory(directory)
    dtype = choose_dtype("auto", "cpu", opened.dtype, count_parameters(opened.config).total).value
    return hub.load_model(directory, dtype=getattr(torch, dtype), device="cpu")


def _facts(name: str, config: ModelConfig, tokens: int, layers: list[LayerSparsity]) -> dict[str, Any]:
    import dataclasses

    from persimmon.fast.sparsity import savings

    return {
        "model": name,
        "tokens": tokens,
        "zeros": sum(layer.zeros for layer in layers) / len(layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "mlp_bytes_per_token": {
            form: dataclasses.asdict(saved) for form, saved in savings(config, layers).items()
        },
    }  # fmt: skip


def _show(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from persimmon.cli.info import size

    console = Console(highlight=False)
    console.print(f"{facts['zeros']:.1%} zeros after the squared ReLU, over {facts['tokens']:,} tokens\n", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "zeros", "overlap", "by chance"):
        table.add_column(column, justify="right")
    for number, layer in enumerate(facts["layers"], start=1):
        shares = (layer["zeros"], layer["overlap"], 1 - layer["zeros"])
        table.add_row(str(number), *(f"{share:.1%}" for share in shares))
    console.print(table)
    print("overlap: active neurons that were active for the token before, too")
    for form, saved in facts["mlp_bytes_per_token"].items():
        dense, skipped = saved["dense"], saved["skipped"]
        amounts = f"{size(skipped)} of the MLPs' {size(dense)}"
        print(f"{form}: {amounts} per decoded token need not be read ({skipped / dense:.0%})")
