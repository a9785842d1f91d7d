"""`persimmon bench decode|prefill|kernels|train|serve|report`: the machine's ceiling, then what was achieved."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.atomic import write_text
from persimmon.cli import bench_options as options
from persimmon.cli.options import add_verb, model_name
from persimmon.errors import InputError

if TYPE_CHECKING:
    from persimmon.bench.ceiling import Ceiling
    from persimmon.bench.peers import Peer
    from persimmon.bench.row import Row

HELP = "measure speed and memory against the machine's ceiling and against peers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="bench_verb", required=True, metavar="decode|prefill|kernels|train|serve|report")
    options.add_decode(add_verb(verbs, "decode", "tokens per second of decoding"))
    options.add_prefill(add_verb(verbs, "prefill", "tokens per second of reading prompts"))
    options.add_kernels(
        add_verb(
            verbs, "kernels", "every kernel of the CPU engine against bandwidth; the choice table of the CUDA engine"
        )
    )
    options.add_train(add_verb(verbs, "train", "tokens per second of a training step"))
    options.add_serve(add_verb(verbs, "serve", "latency and throughput of a server by number of clients"))
    options.add_report(add_verb(verbs, "report", "rows of earlier runs as a table and a figure"))


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
    from persimmon.bench.subject import Subject, load_subject
    from persimmon.checkpoints.download import model_config

    work = decode.DecodeWork(args.context, args.tokens, args.batch, args.fill)
    work.check(model_config(model_name(args)))  # before anything is measured or loaded
    # Before anything is loaded here: two copies of a large model push its files out of the page cache.
    started = decode.first_token_seconds(model_name(args), _load_options(args)) if args.startup else None
    ceiling = _ceiling(args, "read")

    def load() -> Subject:
        return load_subject(model_name(args), _load_options(args))

    subject = load()
    settings = {"context": args.context, "tokens": args.tokens, "batch": args.batch}
    peer = _peer(args, subject, "transformers_decode.py", settings)
    anew = peer is not None and args.peer_restart and subject.facts().get("weights") == "resident"
    side = decode.Ours(subject, work, load if anew else None)
    del subject  # a model that is loaded for each run is not to lie beside itself
    try:
        row = decode.decode_row(side, work, args.runs, ceiling, peer)
    finally:
        if peer is not None:
            peer.close()
    if started is not None:
        row |= decode.startup_fields(started)
    return _finish(args, row)


def _prefill(args: argparse.Namespace) -> int:
    from persimmon.bench.prefill import check_length, prefill_row
    from persimmon.bench.subject import load_subject
    from persimmon.checkpoints.download import model_config

    lengths, config = _numbers("--lengths", args.lengths), model_config(model_name(args))
    for length in lengths:
        check_length(config, length)
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
    if args.device != "cpu":
        return _gpu_kernels(args)
    from persimmon.bench.kernels import Setting, kernels_row
    from persimmon.config import preset
    from persimmon.fast.cpu.formats import FORMATS
    from persimmon.machine import cpu_threads

    formats = [name.strip() for name in (args.formats or "q8,q4,p44,bfloat16").split(",")]
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


def _gpu_kernels(args: argparse.Namespace) -> int:
    from persimmon.config import preset
    from persimmon.engines import ENGINES, choose_device
    from persimmon.errors import UnavailableError
    from persimmon.fast.cuda.choice import default_path

    if args.device.partition(":")[0] != "cuda":
        raise InputError(f"--device of bench kernels is cpu, cuda or cuda:N, got {args.device!r}")
    config, tokens = preset(args.preset), _numbers("--batches", args.batches)
    device = choose_device(args.device).value
    if (reason := ENGINES["cuda"].why_not(config)) is not None:
        raise UnavailableError(reason)
    import torch

    from persimmon.bench.gpu_kernels import Setting, gpu_kernels_row

    formats = [name.strip() for name in (args.formats or "bfloat16,q8,p44").split(",")]
    row, table = gpu_kernels_row(
        Setting(config, torch.device(device), formats, tokens, args.active, args.runs, args.layer_bytes)
    )
    place = args.table or default_path()
    table.save(place)
    _say(args, f"the engine chooses by {place} from now on")
    return _finish(args, row)


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
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, text + "\n")
    if args.page is not None:
        write_text(args.page, report.with_rows(args.page.read_text(encoding="utf-8"), rows))
    if args.plot is not None:
        report.figure(rows, args.plot)
        note(f"figure: {args.plot}")
    return 0


# -- what they share -----------------------------------------------------------------------------------------


def _ceiling(args: argparse.Namespace, kind: str) -> Ceiling:
    """Measure the ceiling and print it, before anything is loaded."""
    from persimmon.bench.ceiling import Ceiling
    from persimmon.machine import cpu_threads

    device = getattr(args, "device", "cpu")
    ceiling = Ceiling(kind, args.threads or cpu_threads(), args.bandwidth_bytes, device)
    _say(args, ceiling.describe())
    return ceiling


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("device", "engine", "dtype", "threads")}
    given = {name: getattr(args, name) for name in ("kv_dtype", "sparsity_margin", "weights")}
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

    for text in report.summary(row):
        _say(args, text)
    if args.out is not None:
        write(row, args.out)
    if args.plot is not None:
        report.figure({args.out.stem if args.out else row["bench"]: row}, args.plot)
    sys.stdout.write(line(row) + "\n")
    return 0
