"""`persimmon bench decode|prefill|kernels|train|serve|report`: the machine's ceiling, then what was achieved."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import add_model_argument, model_name
from persimmon.errors import InputError

if TYPE_CHECKING:
    from persimmon.bench.ceiling import Ceiling
    from persimmon.bench.peers import Peer
    from persimmon.bench.row import Row

HELP = "measure speed and memory against the machine's ceiling and against peers"

_LIST = "comma-separated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="bench_verb", required=True, metavar="decode|prefill|kernels|train|serve|report")
    _add_decode(verbs.add_parser("decode", help="tokens per second of decoding"))
    _add_prefill(verbs.add_parser("prefill", help="tokens per second of reading prompts"))
    _add_kernels(verbs.add_parser("kernels", help="every kernel of the CPU engine against read bandwidth"))
    _add_train(verbs.add_parser("train", help="tokens per second of a training step"))
    _add_serve(verbs.add_parser("serve", help="latency and throughput of a server by number of clients"))
    _add_report(verbs.add_parser("report", help="rows of earlier runs as a table and a figure"))


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--context", type=int, default=32, metavar="N", help="tokens in the cache before (default: 32)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded by a run (default: 32)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences side by side (default: 1)")
    parser.add_argument(
        "--fill", default="read", choices=("read", "copy"),
        help="read the context for real, or copy one block of it over the cache: the same work for attention, "
        "without the wait (default: read)",
    )  # fmt: skip
    parser.add_argument(
        "--startup", action="store_true", help="also time a new process from its start to its first token"
    )
    _add_measuring(parser)
    _add_peer(parser)


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--lengths", default="128,512,2048", metavar="LIST", help=f"tokens of the prompts, {_LIST} (128,512,2048)"
    )
    _add_measuring(parser)
    _add_peer(parser)


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="8b", metavar="NAME", help="whose layers are measured (default: 8b)")
    parser.add_argument(
        "--formats", default="q8,q4,p44,bfloat16", metavar="LIST", help=f"of weights, {_LIST} (q8,q4,p44,bfloat16)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--depth", type=int, default=2048, metavar="N", help="keys that the attention kernel reads (default: 2048)"
    )
    parser.add_argument(
        "--layer-bytes", type=int, default=1 << 30, metavar="N",
        help="bytes of layers that a token reads, beyond any cache (default: 1 GiB)",
    )  # fmt: skip
    _add_measuring(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    shape = {"hidden": 256, "layers": 6, "mlp": 1024, "heads": 8, "vocab": 8192}
    for name, size in shape.items():
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"of the model (default: {size})")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a step (default: 8)")
    parser.add_argument(
        "--documents", type=int, default=0, metavar="N",
        help="tokens of the documents in a row, attended to separately; peers then still attend to whole rows",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--dtype", default="float32", metavar="NAME", help="float32, or bfloat16 autocast on both sides"
    )
    _add_measuring(parser)
    _add_against(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--url", metavar="URL", help="measure this running server instead of one of its own")
    parser.add_argument("--pid", type=int, metavar="N", help="process of that server, whose memory is then watched")
    parser.add_argument(
        "--clients", default="1,4,16,64", metavar="LIST", help=f"numbers of clients, {_LIST} (default: 1,4,16,64)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each run (default: 10)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="most tokens of an answer (default: 64)")
    parser.add_argument(
        "--disconnects", type=float, default=0.0, metavar="SHARE", help="of requests whose client leaves in between"
    )
    _add_measuring(parser)
    _add_peer(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", nargs="+", metavar="FILE", help="rows, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown table there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table between the marks of this page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows into a PNG or SVG")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON document")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    group = parser.add_argument_group("how the model runs")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--engine", default="auto", metavar="NAME", help="auto, cpu or reference")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="auto, float32 or bfloat16")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument("--kv-dtype", metavar="NAME", help="keys and values in float32 or int8 (cpu engine)")
    group.add_argument("--sparsity-margin", type=float, metavar="K", help="see persimmon generate (cpu engine)")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured and kept")
    group.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs; figures are medians (default: 5)")
    group.add_argument(
        "--bandwidth-bytes", type=int, metavar="N", help="read to measure bandwidth (default: 2 GiB where they fit)"
    )
    group.add_argument("--out", type=Path, metavar="FILE", help="keep the row there")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the row into a PNG or SVG")
    group.add_argument("--json", action="store_true", help="print the row and nothing else")
    group.add_argument("--quiet", action="store_true", help="no notes on stderr")


def _add_against(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("a peer in turns with us")
    group.add_argument(
        "--against", metavar="PEER",
        help="transformers, or a command that prints llama-bench's JSON or a last line with tokens_per_second; "
        "{tokens}, {context}, {length}, {batch} and {threads} are filled in",
    )  # fmt: skip
    return group


def _add_peer(parser: argparse.ArgumentParser) -> None:
    group = _add_against(parser)
    group.add_argument(
        "--peer-dtype", metavar="NAME",
        help="of transformers: float32 or bfloat16 (default: float32 for weights it can load, else bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--peer-restart", action="store_true", help="start the peer anew for every run, and end it before ours"
    )


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "decode": _decode, "prefill": _prefill, "kernels": _kernels, "train": _train, "serve": _serve,
        "report": _report,
    }  # fmt: skip
    if args.bench_verb != "report":
        _check_positive(args, ("runs", "tokens", "batch", "context", "threads", "depth", "bandwidth_bytes"))
    return verbs[args.bench_verb](args)


def _check_positive(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")


def _numbers(flag: str, text: str) -> list[int]:
    """A comma-separated list of positive whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{flag} is a comma-separated list of whole numbers from 1, got {text!r}")
    return [int(part) for part in parts]


# -- the benchmarks ------------------------------------------------------------------------------------------


def _decode(args: argparse.Namespace) -> int:
    from persimmon.bench import decode
    from persimmon.bench.subject import load_subject

    ceiling = _ceiling(args, "read")
    subject = load_subject(model_name(args), _load_options(args))
    work = decode.DecodeWork(args.context, args.tokens, args.batch, args.fill)
    settings = {"context": args.context, "tokens": args.tokens, "batch": args.batch}
    peer = _peer(args, subject, "transformers_decode.py", settings)
    try:
        row = decode.decode_row(subject, work, args.runs, ceiling, peer)
    finally:
        if peer is not None:
            peer.close()
    if args.startup:
        row |= decode.startup_fields(decode.first_token_seconds(model_name(args), _load_options(args)))
    return _finish(args, row)


def _prefill(args: argparse.Namespace) -> int:
    from persimmon.bench.prefill import prefill_row
    from persimmon.bench.subject import load_subject

    lengths = _numbers("--lengths", args.lengths)
    ceiling = _ceiling(args, "gemm")
    subject = load_subject(model_name(args), _load_options(args))
    peers: dict[int, Peer] = {}
    try:
        for length in lengths:
            peer = _peer(args, subject, "transformers_prefill.py", {"length": length})
            if peer is not None:
                peers[length] = peer
        row = prefill_row(subject, lengths, args.runs, ceiling, peers)
    finally:
        for peer in peers.values():
            peer.close()
    return _finish(args, row)


def _kernels(args: argparse.Namespace) -> int:
    from persimmon.bench.kernels import Setting, kernels_row
    from persimmon.config import preset
    from persimmon.fast.cpu.formats import FORMATS
    from persimmon.machine import cpu_threads

    formats = [name.strip() for name in args.formats.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"--formats holds {name!r}; there are {', '.join(FORMATS)}")
    config = preset(args.preset)
    ceiling = _ceiling(args, "read")
    setting = Setting(
        config, args.threads or cpu_threads(), args.runs, layer_bytes=args.layer_bytes,
        vocab_size=min(65_536, config.vocab_size), depths=(16, args.depth),
    )  # fmt: skip
    return _finish(args, kernels_row(setting, formats, ceiling))


def _train(args: argparse.Namespace) -> int:
    from persimmon.config import ModelConfig
    from persimmon.machine import cpu_threads

    if args.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype must be float32 or bfloat16, got {args.dtype!r}")
    if args.documents < 0 or args.documents > args.context:
        raise InputError(f"--documents must be from 0 to the {args.context} tokens of a row, got {args.documents}")
    config = ModelConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp, num_layers=args.layers,
        num_heads=args.heads, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if args.context > config.max_positions:
        raise InputError(f"--context must be at most {config.max_positions}, got {args.context}")
    from persimmon.bench.peers import peer_of
    from persimmon.bench.train import TrainWork, train_row

    threads = args.threads or cpu_threads()
    work = TrainWork(config, args.context, args.batch, args.dtype, args.documents)
    ceiling = _ceiling(args, "gemm")
    settings = {
        "config": _hub_config(config), "context": args.context, "batch": args.batch, "dtype": args.dtype,
        "threads": threads,
    }  # fmt: skip
    peer = peer_of(args.against, "transformers_train.py", settings) if args.against else None
    try:
        row = train_row(work, threads, args.runs, ceiling, peer)
    finally:
        if peer is not None:
            peer.close()
    return _finish(args, row)


def _serve(args: argparse.Namespace) -> int:
    from persimmon.cli.bench_serve import serve_benchmark

    levels = _numbers("--clients", args.clients)
    if args.pid is not None and args.url is None:
        raise InputError("--pid belongs to --url; a server of its own is watched anyway")
    if args.against not in (None, "transformers"):
        raise InputError(f"--against of bench serve must be transformers, got {args.against!r}")
    return _finish(args, serve_benchmark(args, levels, _ceiling(args, "gemm")))


def _report(args: argparse.Namespace) -> int:
    from persimmon.bench import report
    from persimmon.cli.console import note, print_json

    rows = report.read_rows([Path(place) for place in args.places])
    text = report.table(rows)
    if args.json:
        print_json(rows)
    else:
        print(text)
    if args.out is not None:
        _write_text(args.out, text + "\n")
    if args.page is not None:
        _write_text(args.page, report.with_rows(args.page.read_text(encoding="utf-8"), rows))
    if args.plot is not None:
        report.figure(rows, args.plot)
        note(f"figure: {args.plot}")
    return 0


def _write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


# -- what they share -----------------------------------------------------------------------------------------


def _ceiling(args: argparse.Namespace, kind: str) -> Ceiling:
    """Measure the ceiling and print it, before anything is loaded."""
    from persimmon.bench.ceiling import Ceiling
    from persimmon.machine import cpu_threads

    ceiling = Ceiling(kind, args.threads or cpu_threads(), args.bandwidth_bytes)
    _say(args, ceiling.describe())
    return ceiling


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("device", "engine", "dtype", "threads")}
    given = {"kv_dtype": args.kv_dtype, "sparsity_margin": args.sparsity_margin}
    return options | {name: value for name, value in given.items() if value is not None}


def _peer(args: argparse.Namespace, subject: Any, script: str, settings: dict[str, Any]) -> Peer | None:
    """The peer of --against, on the same weights where it can read them and on random ones of the shape otherwise."""
    from persimmon.bench.peers import peer_of
    from persimmon.fast.cpu.packed import is_packed

    if not args.against:
        return None
    packed = is_packed(subject.directory)
    model = {"config": _hub_config(subject.config)} if packed else {"directory": str(subject.directory)}
    dtype = args.peer_dtype or ("bfloat16" if packed else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--peer-dtype must be float32 or bfloat16, got {dtype!r}")
    everything = {**settings, **model, "dtype": dtype, "threads": subject.threads}
    return peer_of(args.against, script, everything, restart=args.peer_restart)


def _hub_config(config: Any) -> dict[str, Any]:
    """The keyword arguments of transformers' configuration."""
    left_out = ("architectures", "model_type", "torch_dtype", "dtype", "persimmon_rotary_precision")
    return {name: value for name, value in config.to_hub().items() if name not in left_out}


def _say(args: argparse.Namespace, text: str) -> None:
    """A line before the JSON; on stderr when stdout is for the JSON alone."""
    if args.json:
        from persimmon.cli.console import note

        note(text, quiet=args.quiet)
    else:
        print(text, flush=True)


def _finish(args: argparse.Namespace, row: Row) -> int:
    """Print what was achieved and, last, the row; keep and draw it."""
    from persimmon.bench import report
    from persimmon.bench.row import line, write

    for text in _summary(row):
        _say(args, text)
    if args.out is not None:
        write(row, args.out)
    if args.plot is not None:
        report.figure({args.out.stem if args.out else row["bench"]: row}, args.plot)
    sys.stdout.write(line(row) + "\n")
    return 0


def _summary(row: Row) -> list[str]:
    """The row for a person."""
    from persimmon.bench.report import number
    from persimmon.machine import size_text

    unit = "layers/s" if row["bench"] == "kernels" else "tokens/s"
    most, percent = number(row["ceiling_tokens_per_second"]), row["percent_of_ceiling"]
    lines = [f"achieved: {number(row['tokens_per_second'])} {unit}, {percent:.0f} % of the ceiling of {most}"]
    if row["bytes_per_token"] is not None:
        read, dense = size_text(row["bytes_per_token"]), size_text(row["bytes_per_token_dense"])
        lines.append(f"read per token: {read} (dense: {dense})")
    for entry in row.get("kernels", ()):
        share = f" at {entry['active_share']:.0%} active" if "active_share" in entry else ""
        lines.append(
            f"  {entry['kernel']}{share}: {entry['microseconds']:.0f} us, {entry['gb_s']:.1f} GB/s, "
            f"{entry['percent_of_bandwidth']:.0f} % of bandwidth"
        )
    for entry in row.get("lengths", ()) or row.get("levels", ()):
        what = f"{entry['clients']} clients" if "clients" in entry else f"{entry['context']} tokens"
        lines.append(f"  {what}: {number(entry['tokens_per_second'])} tokens/s")
    if "ratio" in row:
        low, high, name = row["ratio_min"], row["ratio_max"], row["peer"]["name"]
        lines.append(f"against {name}: {row['ratio']:.2f}x (pairs {low:.2f}-{high:.2f})")
    if "startup_seconds" in row:
        lines.append(f"start to first token: {row['startup_seconds']:.2f} s")
    return [*lines, f"peak memory: {size_text(row['peak_rss_bytes'])}"]
