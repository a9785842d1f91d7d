"""The servers of `persimmon bench serve`: ours and the peer's, started unless a running one is named."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from persimmon.bench.ceiling import Ceiling
from persimmon.bench.load import Load, address_of
from persimmon.bench.peers import script_path
from persimmon.bench.row import Row
from persimmon.bench.serve import ServeWork, Target, serve_row
from persimmon.bench.servers import ServerProcess, free_port
from persimmon.checkpoints.directory import open_directory, read_config
from persimmon.checkpoints.download import resolve
from persimmon.cli.options import model_name
from persimmon.errors import InputError
from persimmon.machine import cpu_threads
from persimmon.tokenizer import Tokenizer

PROMPTS = (
    "It was a cold morning, and the old man went down to the harbour to look at the boats.",
    "def read_lines(path):\n    with open(path) as file:\n        return",
    "The first chapter of the report describes how the data were collected and",
    "human: I would like to book a table for four people on Friday evening.\n\nadept:",
    "import os\nimport sys\n\n\nclass Counter:\n    def __init__(self, start=0):\n        self.value =",
    "When the train arrived at the small station, nobody was there except",
)  # fmt: skip
"""What clients ask to be continued: text, code and a question, in turns."""


def serve_benchmark(args: argparse.Namespace, levels: list[int], ceiling: Ceiling) -> Row:
    """Start what must be started, measure, and end it again."""
    name = model_name(args)
    directory = resolve(name)
    tokenizer = Tokenizer.load(directory)
    served = Path(name).name
    load = Load(
        clients=1,
        seconds=args.seconds,
        prompts=[tokenizer.encode(prompt, bos=True) for prompt in PROMPTS],
        max_tokens=args.tokens,
        model=served,
        disconnects=args.disconnects,
    )
    work = ServeWork(tuple(levels), args.runs, load)
    facts = {"model": served, **_engine(args, directory), "threads": args.threads or cpu_threads()}
    with contextlib.ExitStack() as stack:
        ours = _ours(args, stack, name, max(levels))
        peer = _transformers(args, stack, directory) if args.against else None
        return serve_row(facts, read_config(directory), ours, peer, work, ceiling)


def _engine(args: argparse.Namespace, directory: Path) -> dict[str, str]:
    """What a server with these options runs; a server that was running already does not say."""
    from persimmon.accounting import count_parameters
    from persimmon.engines import choose_device, choose_dtype, choose_engine
    from persimmon.fast.cpu.packed import is_packed, open_packed
    from persimmon.fast.cpu.weights import float_format

    if args.url is not None:
        return {"engine": "not known", "format": "not known"}
    config, packed = read_config(directory), is_packed(directory)
    stored = open_packed(directory).form.name if packed else open_directory(directory).dtype
    device = choose_device(args.device).value
    engine = choose_engine(args.engine, device, packed, config).value
    dtype = choose_dtype(args.dtype, device, stored, count_parameters(config).total).value
    if engine == "cpu" and not packed:  # it keeps the checkpoint's bits
        dtype = float_format(open_directory(directory), dtype).name
    return {"engine": engine, "format": dtype}


def _ours(args: argparse.Namespace, stack: contextlib.ExitStack, name: str, most: int) -> Target:
    if args.url is not None:
        return Target("persimmon", address_of(args.url), args.pid)
    port = free_port()
    command = [sys.executable, "-m", "persimmon.cli.main", "serve", name, "--port", str(port), "--no-access-log"]
    command += ["--max-concurrency", str(most), "--max-queue", str(most), "--drain", "5", "--quiet"]
    command += ["--device", args.device, "--engine", args.engine, "--dtype", args.dtype]
    for flag in ("threads", "kv_dtype", "sparsity_margin", "weights"):
        if getattr(args, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    server = stack.enter_context(ServerProcess(command, port))
    return Target("persimmon", server.address, server.pid)


def _transformers(args: argparse.Namespace, stack: contextlib.ExitStack, directory: Path) -> Target:
    dtype = args.peer_dtype or "float32"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--peer-dtype must be float32 or bfloat16, got {dtype!r}")
    settings: dict[str, Any] = {
        "directory": str(directory), "dtype": dtype, "threads": args.threads or cpu_threads(),
    }  # fmt: skip
    port = free_port()
    command = [sys.executable, str(script_path("transformers_server.py")), str(port), json.dumps(settings)]
    server = stack.enter_context(ServerProcess(command, port))
    return Target("transformers", server.address, server.pid)
