"""What the machine can do: bytes read per second, and operations per second of matrix products.

Measured in a process of its own, so that its gigabytes do not count as the model's memory:

    python -m persimmon.bench.limits read --threads 2 --bytes 2147483648
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from persimmon.bench.timing import Stopwatch, Summary
from persimmon.engines import choose_device
from persimmon.errors import UnavailableError
from persimmon.machine import cpu_features, memory_available

READ_BYTES = 2 << 30
"""Several times the largest caches of servers (hundreds of MiB)."""

_LEAST_READ_BYTES = 1 << 30
_READ_PASSES = 7
_GEMM_SIZE = 2048  # rows and columns: 17 GFLOP a product, large enough for full rate
_GPU_GEMM_SIZE = 8192
_GEMM_PASSES = 5


@dataclass(frozen=True)
class Limit:
    """One ceiling of the machine, in 10^9 units per second."""

    value: float
    method: str
    """How it was measured: the best of several ways."""
    samples: tuple[float, ...]
    """Passes of that way."""
    others: dict[str, float]
    """Medians of the other ways."""


def default_read_bytes() -> int:
    """2 GiB, less where memory is short, at least 1 GiB."""
    free = memory_available() or READ_BYTES
    return max(_LEAST_READ_BYTES, min(READ_BYTES, free // 3))


def best(ways: dict[str, list[float]]) -> Limit:
    """The way with the largest median."""
    medians = {name: Summary(tuple(samples)).median for name, samples in ways.items()}
    winner = max(medians, key=medians.__getitem__)
    others = {name: value for name, value in medians.items() if name != winner}
    return Limit(medians[winner], winner, tuple(ways[winner]), others)


def merge(first: Limit, second: Limit) -> Limit:
    """Two measurements of one limit, before and after a run, as one: all samples of the better way."""
    if first.method != second.method:
        return max(first, second, key=lambda limit: limit.value)
    samples = (*first.samples, *second.samples)
    return Limit(Summary(samples).median, first.method, samples, first.others)


def read_bandwidth(threads: int, num_bytes: int, device: str = "cpu") -> Limit:
    """GB/s at which `threads` threads of this process, or a GPU, read an array from end to end."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    if device != "cpu":
        resident = torch.ones(num_bytes // 4, device=device)
        return best({"sum (torch)": _rates(lambda: float(resident.sum()), num_bytes / 1e9, _READ_PASSES)})
    data = np.ones(num_bytes // 4, np.float32)
    whole = torch.from_numpy(data)
    parts = np.array_split(data, threads)

    def dots() -> None:
        for _ in pool.map(lambda part: float(np.dot(part, part)), parts):
            pass

    with ThreadPoolExecutor(threads) as pool:
        ways = {"sum (torch)": lambda: whole.sum(), "dot product (numpy)": dots}
        return best({name: _rates(way, data.nbytes / 1e9, _READ_PASSES) for name, way in ways.items()})


def matrix_rate(threads: int, size: int | None = None, device: str = "cpu") -> Limit:
    """GFLOP/s (int8: 10^9 operations) of square matrix products, in every type the processor has instructions for."""
    import torch

    torch.set_num_threads(threads)
    size = size or (_GEMM_SIZE if device == "cpu" else _GPU_GEMM_SIZE)
    work = 2 * size**3 / 1e9
    if device != "cpu":
        halves = torch.randn(size, size, device=device).bfloat16()
        return best({"bfloat16": _rates(lambda: float((halves @ halves)[0, 0]), work, _GEMM_PASSES)})
    features = set(cpu_features())
    x = torch.randn(size, size)
    ways: dict[str, Callable[[], Any]] = {"float32": lambda: x @ x}
    if features & {"avx512_bf16", "amx_bf16", "bf16"}:
        half = x.bfloat16()
        ways["bfloat16"] = lambda: half @ half
    if features & {"avx512_vnni", "amx_int8", "i8mm"}:
        whole = (x * 20).to(torch.int8)
        ways["int8"] = lambda: torch._int_mm(whole, whole)
    return best({name: _rates(way, work, _GEMM_PASSES) for name, way in ways.items()})


def _rates(action: Callable[[], Any], work: float, passes: int) -> list[float]:
    """Work per second of each pass; one more before them does not count."""
    action()
    rates = []
    for _ in range(passes):
        with Stopwatch() as watch:
            action()
        rates.append(work / watch.seconds)
    return rates


def measure(kind: str, threads: int, num_bytes: int | None = None, device: str = "cpu") -> Limit:
    """`read` or `gemm`, in a process of its own. Raises UnavailableError when that fails.

    device: as `persimmon.load` takes it; `auto` is what it would choose.
    """
    command = [sys.executable, "-m", "persimmon.bench.limits", kind, "--threads", str(threads)]
    command += ["--bytes", str(num_bytes or default_read_bytes()), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"the machine's limits could not be measured: {done.stderr.strip()[-300:]}")
    facts = json.loads(done.stdout)
    return Limit(facts["value"], facts["method"], tuple(facts["samples"]), facts["others"])


def main() -> None:
    """Measure here and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("read", "gemm"))
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bytes", type=int, default=READ_BYTES)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = choose_device(args.device).value
    if args.kind == "read":
        limit = read_bandwidth(args.threads, args.bytes, device)
    else:
        limit = matrix_rate(args.threads, device=device)
    print(json.dumps(vars(limit)))


if __name__ == "__main__":
    main()
