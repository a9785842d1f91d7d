"""Every row of benchmarks/results, one command each: to be started on a machine that does nothing else.

    python benchmarks/run_all.py --models MODELS --llama-bench FILE --gguf FILE --gguf-4-layers FILE --data DATA/eval

A row that is there already is passed over, so an interrupted run goes on where it was; --again measures anew, --only
chooses rows, --list prints the commands and runs none. Rows whose peer is not given are left out and named. MODELS is a
folder for the random models (about 25 GB); what is missing in it is written first, which takes a while.

llama.cpp has no Persimmon any more. Its stand-in is the architecture `nemotron`: the same matrices and squared ReLU,
LayerNorm with bias, without QK LayerNorm; random Q4_0 weights of the same shape.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

ROW_SECONDS = 600
"""Most time of one row; the longest takes about four minutes on two cores."""


@dataclass(frozen=True)
class Model:
    """A random model of the 8B's width."""

    name: str
    format: str
    layers: int
    vocab_size: int


MODELS = (
    Model("8b-p44", "p44", 36, 262_144),
    Model("8b-q4", "q4", 36, 262_144),
    Model("8b-4l-p44", "p44", 4, 32_768),
    Model("8b-4l-q4", "q4", 4, 32_768),
)


@dataclass(frozen=True)
class Row:
    """A row and the command that measures it; `--out` is added."""

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    """Models of the folder."""


def bench(*words: str) -> list[str]:
    """`persimmon bench ...` with this interpreter."""
    return [sys.executable, "-m", "persimmon.cli.main", "bench", *words]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """All rows, the most telling first."""
    yield from full_rows(args)
    yield from four_layer_rows(args)
    yield from mini_rows(args)
    yield from train_rows()


def full_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The whole 8B: against llama.cpp and transformers, at depth, several sequences, start-up."""
    p44, q4 = str(args.models / "8b-p44"), str(args.models / "8b-q4")
    # Mapped where the peer needs the memory (24 GiB): another copy of ours, alike on both sides, or 17 GiB of bfloat16.
    mapped = ["--weights", "mapped"]
    alone = bench("decode", p44, "--tokens", "16", "--runs", "1", "--bandwidth-bytes", str(1 << 26), *mapped)
    ourselves = shlex.join(alone)
    if args.llama_bench and args.gguf:
        peer = f"{shlex.quote(str(args.llama_bench))} -m {shlex.quote(str(args.gguf))}"
        peer += " -p 0 -n {tokens} -r 1 -t {threads} -o json"
        yield Row("decode-8b-p44-llama", bench("decode", p44, "--runs", "3", "--against", peer), ("8b-p44",))
        yield Row("decode-8b-q4-llama", bench("decode", q4, "--runs", "3", "--against", peer), ("8b-q4",))
    deep = ["--tokens", "16", "--fill", "copy", "--kv-dtype", "int8", "--runs", "3"]
    yield Row(
        "decode-8b-p44-16k",
        bench("decode", p44, "--context", "16352", *deep, *mapped, "--against", ourselves),
        ("8b-p44",),
    )
    yield Row("decode-8b-p44-2k", bench("decode", p44, "--context", "2032", *deep), ("8b-p44",))
    yield Row(
        "decode-8b-p44-batch8",
        bench("decode", p44, "--batch", "8", "--tokens", "16", "--runs", "3", *mapped, "--against", ourselves),
        ("8b-p44",),
    )
    yield Row("startup-8b-p44", bench("decode", p44, "--tokens", "8", "--runs", "2", "--startup"), ("8b-p44",))
    # Both models do not fit into 24 GiB: each is loaded anew for its runs, which takes most of the row's time.
    transformers = ["--against", "transformers", "--peer-dtype", "bfloat16", "--peer-restart"]
    yield Row(
        "decode-8b-p44-transformers",
        bench("decode", p44, "--tokens", "8", "--runs", "2", "--weights", "resident", *transformers),
        ("8b-p44",),
    )


def four_layer_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Four layers of full width, which every peer runs in any precision; and the kernels."""
    p44, q4 = str(args.models / "8b-4l-p44"), str(args.models / "8b-4l-q4")
    if args.llama_bench and args.gguf_4_layers:
        peer = f"{shlex.quote(str(args.llama_bench))} -m {shlex.quote(str(args.gguf_4_layers))}"
        reading = peer + " -p {length} -n 0 -r 1 -t {threads} -o json"
        yield Row(
            "prefill-8b4l-q4-llama",
            bench("prefill", q4, "--lengths", "512", "--runs", "3", "--against", reading),
            ("8b-4l-q4",),
        )
        decoding = peer + " -p 0 -n {tokens} -r 1 -t {threads} -o json"
        yield Row("decode-8b4l-q4-llama", bench("decode", q4, "--against", decoding), ("8b-4l-q4",))
    ourselves = bench("decode", q4, "--runs", "1", "--bandwidth-bytes", str(1 << 26))
    yield Row(
        "decode-8b4l-q4-batch8", bench("decode", q4, "--batch", "8", "--against", shlex.join(ourselves)), ("8b-4l-q4",)
    )
    transformers = ["--against", "transformers", "--peer-dtype", "bfloat16"]
    yield Row("decode-8b4l-p44-transformers", bench("decode", p44, *transformers), ("8b-4l-p44",))
    yield Row("kernels", bench("kernels", "--runs", "3"))


def mini_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The shipped model against transformers on the same weights: decoding, serving, evaluation."""
    yield Row(
        "decode-mini-transformers",
        bench("decode", "mini", "--tokens", "128", "--runs", "25", "--against", "transformers"),
    )
    serving = ["serve", "mini", "--clients", "1,4,8,16,64", "--seconds", "4", "--runs", "2"]
    yield Row("serve-mini-transformers", bench(*serving, "--against", "transformers"))
    leaving = ["--clients", "64", "--seconds", "120", "--runs", "1", "--disconnects", "0.33"]
    yield Row("serve-mini-disconnects", bench("serve", "mini", *leaving))
    if args.data:
        script = [sys.executable, str(ROOT / "benchmarks" / "evaluation.py"), "mini", "--data", str(args.data)]
        yield Row("eval-mini-transformers", [*script, "--limit", "60"])


def train_rows() -> Iterator[Row]:
    """A training step of hidden 256 and 6 layers, at both lengths, in both precisions where the processor has them."""
    sys.path.insert(0, str(ROOT / "src"))
    from persimmon.machine import cpu_features

    dtypes = ["float32"] + (["bfloat16"] if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features()) else [])
    for dtype in dtypes:
        for length, batch, documents in ((1024, 8, 0), (16384, 1, 0), (16384, 1, 1024)):
            shape = ["--context", str(length), "--batch", str(batch), "--documents", str(documents), "--dtype", dtype]
            name = f"train-{length}x{batch}" + (f"-documents{documents}" if documents else "")
            runs = "2" if length > 1024 else "5"
            yield Row(f"{name}-{dtype}", bench("train", *shape, "--runs", runs, "--against", "transformers"))


def make_models(folder: Path, names: Sequence[str]) -> None:
    """Write the random models that are not there; an interrupted one goes on where it stopped."""
    from persimmon.config import preset
    from persimmon.fast.cpu.synthesize import synthesize

    for model in MODELS:
        if model.name in names and not (folder / model.name / "config.json").is_file():
            print(f"writing {model.name} ...", flush=True)
            shape = {"num_layers": model.layers, "vocab_size": model.vocab_size}
            config = preset("8b", **shape, bos_token_id=1, eos_token_id=2)
            synthesize(config, folder / model.name, model.format, active=0.1, seed=0)


def measure(row: Row, out: Path) -> bool:
    """Run one row; whether it is there now."""
    started = time.monotonic()
    print(f"== {row.name}", flush=True)
    # A group of its own: a row starts peers, and what is left of them would disturb the rows that follow.
    process = subprocess.Popen([*row.command, "--out", str(out)], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(ROW_SECONDS)
        state = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        state = f"stopped after {ROW_SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"== {row.name}: {state}, {time.monotonic() - started:.0f} s\n", flush=True)
    return state == "done"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the random models")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench")
    parser.add_argument("--gguf", type=Path, help="full shape: nemotron, Q4_0, 36 layers, vocabulary 262144")
    parser.add_argument("--gguf-4-layers", type=Path, help="nemotron, Q4_0, 4 layers, vocabulary 32768")
    parser.add_argument("--data", type=Path, help="folder of the evaluation sets")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default: benchmarks/results)")
    parser.add_argument("--only", default="", help="comma-separated names of rows, or beginnings of names")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing; 1 when a row failed."""
    args = parse()
    wanted = tuple(filter(None, args.only.split(",")))
    chosen = [row for row in rows(args) if not wanted or row.name.startswith(wanted)]
    if args.list:
        for row in chosen:
            print(f"{row.name}\n  {shlex.join([*row.command, '--out', str(args.out / (row.name + '.json'))])}")
        return 0
    chosen = [row for row in chosen if args.again or not (args.out / f"{row.name}.json").is_file()]
    make_models(args.models, sorted({name for row in chosen for name in row.needs}))
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [row.name for row in chosen if not measure(row, args.out / f"{row.name}.json")]
    if not (args.llama_bench and args.gguf and args.gguf_4_layers and args.data):
        print("left out: rows of peers and data that were not given (--llama-bench, --gguf, --gguf-4-layers, --data)")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
