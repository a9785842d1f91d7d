"""The arguments of `persimmon bench`, one function for each of its verbs."""

from __future__ import annotations

import argparse
from pathlib import Path

from persimmon.cli.options import WEIGHTS_HELP, add_model_argument

_LIST = "comma-separated"


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench decode`."""
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


def add_prefill(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench prefill`."""
    _add_model(parser)
    parser.add_argument(
        "--lengths", default="128,512,2048", metavar="LIST", help=f"tokens of the prompts, {_LIST} (128,512,2048)"
    )
    _add_measuring(parser)
    _add_peer(parser)


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench kernels`."""
    parser.add_argument("--preset", default="8b", metavar="NAME", help="whose layers are measured (default: 8b)")
    parser.add_argument(
        "--formats", metavar="LIST", help=f"of weights, {_LIST} (q8,q4,p44,bfloat16; on a GPU without q4)"
    )
    group = parser.add_argument_group("the CUDA engine: which MLP is faster, dense or sparse")
    group.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu: the CPU engine's kernels (default); cuda or cuda:N"
    )
    group.add_argument("--batches", default="1,2,4,8", metavar="LIST", help=f"of a step, {_LIST} (1,2,4,8)")
    group.add_argument("--active", type=float, default=0.1, metavar="X", help="share of active neurons (default: 0.1)")
    group.add_argument(
        "--table", type=Path, metavar="FILE",
        help="what the engine chooses by (default: where it looks, $PERSIMMON_KERNEL_TABLE or the cache folder)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--depth", type=int, default=2048, metavar="N", help="keys that the attention kernel reads (default: 2048)"
    )
    parser.add_argument(
        "--layer-bytes", type=int, default=1 << 30, metavar="N",
        help="bytes of layers that a token reads, beyond any cache (default: 1 GiB)",
    )  # fmt: skip
    _add_measuring(parser)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench train`."""
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


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench serve`."""
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


def add_report(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench report`."""
    parser.add_argument("places", nargs="+", metavar="FILE", help="rows, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown table there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table between the marks of this page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows into a PNG or SVG")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON document")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    group = parser.add_argument_group("how the model runs")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--engine", default="auto", metavar="NAME", help="auto, cpu, reference or cuda")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="auto, float32 or bfloat16")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument("--kv-dtype", metavar="NAME", help="keys and values in float32 or int8 (cpu engine)")
    group.add_argument("--sparsity-margin", type=float, metavar="K", help="see persimmon generate (cpu engine)")
    group.add_argument("--weights", metavar="NAME", help=WEIGHTS_HELP)


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
        "--peer-restart",
        action="store_true",
        help="start the peer anew for every run, and end it before ours; resident weights are loaded anew as well",
    )
