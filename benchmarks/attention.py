"""Attention of the CPU engine by depth: what a decoded token and 256 tokens of a prompt take, beside memory bandwidth.

    python benchmarks/attention.py [--heads 64] [--threads N]

One layer with the width of the 8B and next to no MLP and vocabulary, float32 weights. The time at depth 0 is
subtracted, so that what is left is attention. Prints the bandwidth of a large copy in the same process first, then a
JSON object per kind of cache and depth: milliseconds, bytes of keys and values, and GB/s at which they were read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from persimmon.config import preset
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.weights import arrange
from persimmon.infer.decoder import Chunk
from persimmon.model import PersimmonModel

HEAD_DIM = 64
CHUNK = 256  # tokens of a prompt per call, the engine's step
DEPTHS = (0, 2_048, 8_192, 16_128)
REPEATS = 9


def seconds(run: Callable[[], object]) -> float:
    """Median of REPEATS runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy of 512 MiB."""
    source = np.ones(64 << 20)
    target = np.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: np.copyto(target, source)) / 1e9


def one_layer(heads: int, kv_dtype: str, threads: int | None) -> CpuDecoder:
    """Random weights."""
    shape = {"hidden_size": HEAD_DIM * heads, "num_heads": heads, "intermediate_size": 256, "num_layers": 1}
    config = preset("test", **shape)
    model = PersimmonModel(config)
    model.initialize(torch.Generator().manual_seed(0))
    state = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    arrays = arrange(config, FORMATS["float32"], state.__getitem__)
    return CpuDecoder(config, FORMATS["float32"], arrays, kv_dtype=kv_dtype, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    print(json.dumps({"copy_gb_s": round(copy_bandwidth(), 1)}))
    ids = np.random.default_rng(0).integers(0, 320, CHUNK).tolist()
    for kv_dtype in ("int8", "float32"):
        decoder = one_layer(args.heads, kv_dtype, args.threads)
        sequence = decoder.new_sequence(16_384)

        def call(tokens: list[int], depth: int, decoder: CpuDecoder = decoder, sequence: object = sequence) -> None:
            sequence.truncate(depth)  # type: ignore[attr-defined]
            decoder.forward([Chunk(sequence, tokens, "none")])  # type: ignore[arg-type]

        first: tuple[float, float] | None = None
        for depth in DEPTHS:
            while sequence.length < depth:
                decoder.forward([Chunk(sequence, ids[: depth - sequence.length], "none")])
            decode, prefill = (seconds(lambda n=n, depth=depth: call(ids[:n], depth)) for n in (1, CHUNK))
            first = first or (decode, prefill)
            attention = decode - first[0]
            row = {
                "kv_dtype": kv_dtype, "depth": depth, "decode_ms": round(1e3 * decode, 3),
                "attention_ms": round(1e3 * attention, 3), "kv_bytes": depth * decoder.token_bytes,
                "gb_s": round(depth * decoder.token_bytes / attention / 1e9, 1) if depth else None,
                f"prefill_{CHUNK}_ms": round(1e3 * prefill, 1),
                f"prefill_{CHUNK}_attention_ms": round(1e3 * (prefill - first[1]), 1), "threads": decoder.threads,
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
