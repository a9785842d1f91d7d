"""The sections of the measurement, decoding and quality apart: each yields cases, which the driver runs and keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import arithmetic
import baseline
import checks
import decoding
import quality
import torch
from cases import Bench, Case, Section

from persimmon.bench import gpu_kernels
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.kernels.sparse_mlp import MOST_ACTIVE_TOKENS
from persimmon.fast.cuda.plan import describe, plan
from persimmon.infer.decoder import Chunk
from persimmon.infer.params import SamplingParams

COMPILING = 90.0
"""Seconds that torch.compile or transformers may take before their first token: not begun with less. An estimate."""


def check_kernels(bench: Bench) -> Iterator[Case]:
    """Every kernel against torch. A failed check is a result, and the driver's exit code."""
    small = bench.config.replace(num_layers=1)
    for name, run in checks.groups(small, bench.device, bench.dtype):
        yield Case({"group": name}, lambda run=run: checks.held(run()))


def ceilings(bench: Bench) -> Iterator[Case]:
    """Copy bandwidth (bytes read plus written) and the rate of a large square product."""

    def copy() -> dict[str, Any]:
        source = torch.ones((2 << 30 if bench.on_gpu else 4 << 20) // 4, device=bench.device)
        target = torch.empty_like(source)
        seconds = bench.median_seconds(lambda: target.copy_(source))
        return {"gb_s": round(2 * source.nbytes / seconds / 1e9, 1)}

    def matmul() -> dict[str, Any]:
        size = 8192 if bench.on_gpu else 128
        a, b = (torch.randn(size, size, device=bench.device).to(bench.dtype) for _ in range(2))
        return {"tflop_s": round(2 * size**3 / bench.median_seconds(lambda: torch.mm(a, b)) / 1e12, 3)}

    yield Case({"what": "copy"}, copy)
    yield Case({"what": "matmul"}, matmul)


def mlp_table(bench: Bench) -> Iterator[Case]:
    """Dense and sparse MLP per layer, by format and tokens; all layers in turn, so that no cache holds them."""
    for name in bench.formats:
        if name != "q4":  # its down projection is not neuron-major: nothing can be skipped
            for tokens in (n for n in bench.batches if n <= MOST_ACTIVE_TOKENS):
                key = {"format": name, "tokens": tokens}
                yield Case(key, lambda name=name, tokens=tokens: mlp_row(bench, name, tokens))


def mlp_row(bench: Bench, name: str, tokens: int) -> dict[str, Any]:
    """Microseconds of a layer, and the share of neurons that any of the tokens has active."""
    return dict(gpu_kernels.measure_mlp(bench.weights(name), [tokens], bench.median_seconds)[str(tokens)])


def prefill(bench: Bench) -> Iterator[Case]:
    """Reading a prompt whose last logits are wanted."""
    for name in bench.formats:
        for tokens in bench.prompts:
            yield Case(
                {"format": name, "tokens": tokens}, lambda name=name, tokens=tokens: prefill_row(bench, name, tokens)
            )


def prefill_row(bench: Bench, name: str, tokens: int) -> dict[str, Any]:
    """Rate of one prompt."""
    decoder = CudaDecoder(bench.weights(name), cache_tokens=tokens + 64)
    ids = [i % bench.config.vocab_size for i in range(tokens)]
    sequence = decoder.new_sequence(tokens)

    def run() -> None:
        sequence.truncate(0)
        decoder.forward([Chunk(sequence, ids, "last")])

    seconds = bench.median_seconds(run)
    rate = arithmetic.prefill_flops(bench.config, tokens) / seconds
    return {
        "tokens_per_second": round(tokens / seconds, 1), "tflop_s": round(rate / 1e12, 3),
        "percent_of_matmul_peak": arithmetic.percent(rate, bench.ceiling("matmul")),
    }  # fmt: skip


def memory(bench: Bench) -> Iterator[Case]:
    """Planned bytes against what the allocator had at its peak, one sequence of the whole context."""
    for name in bench.formats:
        key = {"format": name, "kv_dtype": bench.kv_dtype(name), "context": bench.prompts[-1]}
        yield Case(key, lambda name=name: memory_row(bench, name))


def memory_row(bench: Bench, name: str) -> dict[str, Any]:
    """A prompt, then two tokens on the device."""
    weights, kv_dtype, context = bench.weights(name), bench.kv_dtype(name), bench.prompts[-1]
    total = torch.cuda.mem_get_info(bench.device)[1] if bench.on_gpu else 0
    planned = plan(bench.config, name, kv_dtype, context, total, reserve=0)
    row = {"planned_bytes": planned.total, "plan": describe(planned)}
    if not bench.on_gpu:
        return row | {"peak_bytes": None}
    bench.release()
    torch.cuda.reset_peak_memory_stats(bench.device)
    decoder = CudaDecoder(weights, cache_tokens=context, kv_dtype=kv_dtype, max_pass_tokens=planned.pass_tokens)
    sequence = decoder.new_sequence(context)
    decoder.forward([Chunk(sequence, [1] * (context - 2), "last")])
    decoder.decode([sequence], [1], [SamplingParams(temperature=0.0)], 2)
    return row | {"peak_bytes": torch.cuda.max_memory_allocated(bench.device)}


def baselines(bench: Bench) -> Iterator[Case]:
    """torch.compile with a static cache in a CUDA graph, and transformers' generate."""
    what = "torch.compile, static cache, CUDA graph" if bench.on_gpu else "plain PyTorch"
    for batch in (bench.batches[0], bench.batches[-1]):
        key = {"what": what, "batch": batch, "context": bench.contexts[0]}
        yield Case(key, lambda batch=batch: plain_row(bench, batch), COMPILING if bench.on_gpu else 0.0)
    key = {"what": "transformers generate", "batch": 1, "context": 8}
    yield Case(key, lambda: transformers_row(bench), COMPILING if bench.on_gpu else 0.0)


def plain_row(bench: Bench, batch: int) -> dict[str, Any]:
    """The same weights in plain PyTorch."""
    weights = bench.weights(bench.plain)
    decoder = baseline.PlainDecoder(weights, batch, bench.contexts[0], compiled=bench.on_gpu)
    with torch.inference_mode():
        step = gpu_kernels.captured(decoder.step, bench.device)
        seconds = bench.median_seconds(lambda: [step() for _ in range(bench.decode_tokens)] and None)
    return {"tokens_per_second": round(batch * bench.decode_tokens / seconds, 2)}


def transformers_row(bench: Bench) -> dict[str, Any]:
    """Its own model; ours leave the memory first."""
    bench.drop_weights()
    rate = baseline.transformers_tokens_per_second(bench.config, bench.device, bench.dtype, bench.decode_tokens)
    return {"tokens_per_second": round(rate, 2)}


SECTIONS: dict[str, Section] = {
    "checks": check_kernels, "ceilings": ceilings, "quality": quality.quality, "mlp": mlp_table,
    "decode": decoding.decode, "pairs": decoding.pairs, "prefill": prefill, "memory": memory, "baselines": baselines,
    "ratios": decoding.ratios,
}  # fmt: skip
"""In the order in which they run, what everything else rests on first."""

NEEDS = {"decode": ("ceilings",), "prefill": ("ceilings",), "ratios": ("ceilings", "decode")}
"""Sections that another one reads."""
