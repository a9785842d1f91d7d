"""`persimmon serve`: an OpenAI-compatible server with a chat page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persimmon.cli.options import add_model_options, load_options, model_name

HELP = "serve a model: OpenAI-compatible API and chat page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_options(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address (default: 127.0.0.1, only here)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name in the API (default: MODEL's)")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="key that requests must carry (repeatable; better: $PERSIMMON_API_KEY or --api-key-file)",
    )  # fmt: skip
    group.add_argument("--api-key-file", metavar="FILE", help="file with one key per line")
    group.add_argument(
        "--allow-public-without-key", action="store_true", help="let an address that others can reach go without a key"
    )
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="also accept this Host header (repeatable)"
    )
    limits = parser.add_argument_group("limits")
    # The second names are vLLM's, for people and scripts that come from there.
    limits.add_argument(
        "--max-concurrency",
        "--max-num-seqs",
        type=int,
        default=16,
        metavar="N",
        help="requests that run together (default: 16)",
    )
    limits.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    limits.add_argument(
        "--max-body", type=int, default=4 << 20, metavar="BYTES", help="largest request (default: 4 MiB)"
    )
    limits.add_argument(
        "--cache-tokens", type=int, metavar="N", help="tokens of the key-value cache (default: by memory)"
    )
    limits.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="most seconds for an answer (default: 3600)"
    )
    limits.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds for answers at the end (default: 30)"
    )
    limits.add_argument("--max-model-len", dest="context", type=int, metavar="N", help="the same as --context")
    parser.add_argument("--no-access-log", action="store_true", help="no JSON line per request on stderr")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.errors import UnavailableError

    settings = settings_from(args)
    try:
        from persimmon.serve.server import build_service, serve
    except ImportError as error:
        raise UnavailableError(f"serving needs {error.name}: pip install 'persimmon[serve]'") from None
    from persimmon.checkpoints.download import model_config, resolve
    from persimmon.cli.console import note
    from persimmon.serve.build import EngineSettings
    from persimmon.serve.guard import write_log
    from persimmon.tokenizer import Tokenizer

    config = model_config(model_name(args))
    config.check_context(args.context)
    directory = resolve(model_name(args))
    engine = EngineSettings(
        str(directory),
        load_options=load_options(args),
        max_running=args.max_concurrency,
        cache_tokens=args.cache_tokens,
    )
    name = args.served_model_name or Path(model_name(args)).name
    service = build_service(engine, Tokenizer.load(directory), name, args.context or config.max_positions, settings)
    note(f"loading {name} ...", quiet=args.quiet)
    return serve(
        service,
        lambda text: note(text, quiet=args.quiet),
        log=_no_log if args.no_access_log else write_log,
    )


def settings_from(args: argparse.Namespace) -> Any:
    """The server's settings from the command line and the environment; InputError names what is wrong."""
    from persimmon.errors import NotFoundError
    from persimmon.serve.settings import ServerSettings, read_keys

    keys = tuple(args.api_key)
    if args.api_key_file is not None:
        file = Path(args.api_key_file)
        if not file.is_file():
            raise NotFoundError(f"--api-key-file {file} does not exist")
        keys += read_keys(file.read_text().splitlines())
    if not keys and os.environ.get("PERSIMMON_API_KEY"):
        keys = (os.environ["PERSIMMON_API_KEY"],)
    return ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=keys,
        allow_public_without_key=args.allow_public_without_key,
        allowed_hosts=tuple(args.allowed_host),
        max_concurrency=args.max_concurrency,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body,
        request_seconds=args.timeout,
        drain_seconds=args.drain,
    )


def _no_log(entry: Mapping[str, Any]) -> None:
    """Say nothing."""
