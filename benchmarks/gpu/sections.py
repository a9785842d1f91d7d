"""The sections of the measurement. Each takes the Bench, writes rows into its report and may stop when time is up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import arithmetic
import baseline
import checks
import torch

from persimmon.bench import gpu_kernels
from persimmon.config import ModelConfig
from persimmon.fast.cuda import synthesize
from persimmon.fast.cuda.choice import KernelTable
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.kernels.sparse_mlp import MOST_ACTIVE_TOKENS
from persimmon.fast.cuda.network import Network
from persimmon.fast.cuda.plan import describe, device_kv_bytes_per_token, plan
from persimmon.fast.cuda.weights import Weights
from persimmon.infer.decoder import Chunk
from persimmon.infer.params import SamplingParams


class OutOfTime(Exception):
    """The budget is used up; what was measured so far is kept."""


@dataclass
class Bench:
    """What is measured on what."""

    config: ModelConfig
    device: torch.device
    formats: list[str]
    active: float
    batches: list[int]
    contexts: list[int]
    prompts: list[int]
    decode_tokens: int
    repeats: int
    """Runs of which the median counts; one more, which compiles and captures, comes before them."""
    deadline: float
    report: dict[str, Any]
    save: Callable[[], None]
    _weights: dict[str, Weights] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bfloat16 on a GPU; float32 in the interpreter, whose bfloat16 is not rounded."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def plain(self) -> str:
        """The unquantized format."""
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def check_time(self) -> None:
        """Raise OutOfTime when the budget is used up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def weights(self, name: str) -> Weights:
        """Synthetic weights; one format at a time is in memory."""
        if name not in self._weights:
            self._weights.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._weights[name] = synthesize.synthesize(self.config, name, self.device, self.active)
        return self._weights[name]

    def median_seconds(self, run: Callable[[], None]) -> float:
        """Median wall time of a run, the device idle before and after."""
        run()
        return statistics.median(gpu_kernels.seconds_of(run, self.device) for _ in range(self.repeats))


def check_kernels(bench: Bench) -> dict[str, Any]:
    """Every kernel against torch. A failed check is a result, and the driver's exit code."""
    small = bench.config.replace(num_layers=1)
    return checks.run_checks(small, bench.device, bench.dtype)


def ceilings(bench: Bench) -> dict[str, Any]:
    """Copy bandwidth (bytes read plus written) and the rate of a large square product."""
    cuda = bench.device.type == "cuda"
    source = torch.ones((2 << 30 if cuda else 4 << 20) // 4, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.median_seconds(lambda: target.copy_(source))
    size = 8192 if cuda else 128
    a, b = (torch.randn(size, size, device=bench.device).to(bench.dtype) for _ in range(2))
    product = bench.median_seconds(lambda: torch.mm(a, b))
    return {
        "copy_gb_s": round(2 * source.nbytes / seconds / 1e9, 1),
        "matmul_tflop_s": round(2 * size**3 / product / 1e12, 3),
    }


def mlp_table(bench: Bench) -> dict[str, Any]:
    """Dense and sparse MLP per layer, by format and tokens."""
    rows: dict[str, dict[str, Any]] = {}
    few = [tokens for tokens in bench.batches if tokens <= MOST_ACTIVE_TOKENS]
    for name in bench.formats:
        weights = bench.weights(name)
        if weights.layers[0].down.neuron_major:
            bench.check_time()
            rows[name] = gpu_kernels.measure_mlp(weights, few, bench.median_seconds)
    return rows


def kernel_table(bench: Bench) -> KernelTable:
    """What was measured, for the engine."""
    measured = bench.report["sections"].get("mlp", {}).get("rows", {})
    return gpu_kernels.kernel_table(measured or {}, bench.report["device"]["name"], bench.active)


def decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens per second by format, cache, batch and context, with the bytes and the ceiling beside them."""
    for name in bench.formats:
        kv_dtypes = [bench.plain] if name == bench.plain else ["int8"]
        for kv_dtype in kv_dtypes:
            for batch, context in cases(bench):
                bench.check_time()
                row = decode_row(bench, name, kv_dtype, batch, context)
                if row is not None:
                    yield row


def cases(bench: Bench) -> Iterator[tuple[int, int]]:
    """Batch sizes at the shortest context, contexts at batch 1, and both large."""
    for batch in bench.batches:
        yield batch, bench.contexts[0]
    for context in bench.contexts[1:]:
        yield 1, context
    if len(bench.batches) > 1 and len(bench.contexts) > 2:
        yield bench.batches[-1], bench.contexts[1]


def decode_row(bench: Bench, name: str, kv_dtype: str, batch: int, context: int) -> dict[str, Any] | None:
    """One case; None when its keys and values do not fit."""
    weights, table = bench.weights(name), kernel_table(bench)
    steps = bench.decode_tokens
    room = min(context + steps * (bench.repeats + 2), bench.config.max_positions)
    cache_tokens = batch * (-(-room // 64) * 64)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(bench.device)
        if cache_tokens * device_kv_bytes_per_token(bench.config, kv_dtype) > 0.9 * free:
            return None
    decoder = CudaDecoder(weights, cache_tokens=cache_tokens, kv_dtype=kv_dtype, table=table)
    sequences = [decoder.new_sequence(room) for _ in range(batch)]
    params = [SamplingParams(temperature=0.0)] * batch
    start = room - steps - 1

    def run() -> None:
        for sequence in sequences:
            sequence.grow(sequence.missing_blocks(max(0, start - sequence.length)))
            sequence.advance(max(0, start - sequence.length))  # the cache holds zeros: the traffic is the same
            sequence.truncate(start)
        decoder.decode(sequences, [1] * batch, params, steps)

    seconds = bench.median_seconds(run)
    return describe_row(bench, decoder, name, kv_dtype, batch, start, seconds / steps)


def describe_row(
    bench: Bench, decoder: CudaDecoder, name: str, kv_dtype: str, batch: int, context: int, seconds: float
) -> dict[str, Any]:
    """A row of the decode section."""
    weights = decoder.weights
    down = sum(layer.down.num_bytes for layer in weights.layers)
    sparse = Network(weights, kernel_table(bench)).runs_sparse(batch)
    union = arithmetic.union_of_active(bench.active, batch)
    step = arithmetic.StepBytes(
        sum(matrix.num_bytes for matrix in synthesize.all_matrices(weights)),
        round(down * (1 - union)) if sparse else 0,
        batch * context * device_kv_bytes_per_token(bench.config, kv_dtype),
    )
    bandwidth = bench.report["sections"]["ceilings"]["rows"]["copy_gb_s"] * 1e9
    ceiling = arithmetic.ceiling_tokens_per_second(step, batch, bandwidth)
    return {
        "format": name, "kv_dtype": kv_dtype, "batch": batch, "context": context, "sparse_mlp": sparse,
        "tokens_per_second": round(batch / seconds, 2), "milliseconds_per_step": round(seconds * 1e3, 4),
        "bytes_per_step": step.total, "bytes_per_step_dense": step.dense,
        "ceiling_tokens_per_second": round(ceiling, 2), "percent_of_ceiling": arithmetic.percent(batch / seconds,
        ceiling), "memory_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else
    None, }  # fmt: skip


def prefill(bench: Bench) -> Iterator[dict[str, Any]]:
    """Reading a prompt whose last logits are wanted."""
    for name in bench.formats:
        for tokens in bench.prompts:
            bench.check_time()
            decoder = CudaDecoder(bench.weights(name), cache_tokens=tokens + 64)
            ids = [i % bench.config.vocab_size for i in range(tokens)]
            sequence = decoder.new_sequence(tokens)

            def run(decoder: CudaDecoder = decoder, ids: list[int] = ids, sequence: Any = sequence) -> None:
                sequence.truncate(0)
                decoder.forward([Chunk(sequence, ids, "last")])

            seconds = bench.median_seconds(run)
            rate = arithmetic.prefill_flops(bench.config, tokens) / seconds / 1e12
            peak = bench.report["sections"]["ceilings"]["rows"]["matmul_tflop_s"]
            yield {
                "format": name, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1),
                "tflop_s": round(rate, 3), "percent_of_matmul_peak": arithmetic.percent(rate, peak),
            }  # fmt: skip


def baselines(bench: Bench) -> Iterator[dict[str, Any]]:
    """torch.compile with a static cache in a CUDA graph, and transformers' generate."""
    weights = bench.weights(bench.plain)
    compiled = bench.device.type == "cuda"
    for batch in (bench.batches[0], bench.batches[-1]):
        bench.check_time()
        decoder = baseline.PlainDecoder(weights, batch, bench.contexts[0], compiled=compiled)
        with torch.inference_mode():
            run = gpu_kernels.captured(decoder.step, bench.device)
            seconds = bench.median_seconds(lambda run=run: [run() for _ in range(bench.decode_tokens)] and None)
        rate = batch * bench.decode_tokens / seconds
        what = "torch.compile, static cache, CUDA graph" if compiled else "plain PyTorch"
        yield {"what": what, "batch": batch, "context": bench.contexts[0], "tokens_per_second": round(rate, 2)}
    bench.check_time()
    bench._weights.clear()
    del weights, decoder, run
    rate = baseline.transformers_tokens_per_second(bench.config, bench.device, bench.dtype, bench.decode_tokens)
    yield {"what": "transformers generate", "batch": 1, "context": 8, "tokens_per_second": round(rate, 2)}


def memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """Planned bytes against what the allocator had at its peak, one sequence of the whole context."""
    for name in bench.formats:
        bench.check_time()
        weights = bench.weights(name)
        kv_dtype = bench.plain if name == bench.plain else "int8"
        context = bench.prompts[-1]
        total = torch.cuda.mem_get_info(bench.device)[1] if bench.device.type == "cuda" else 0
        planned = plan(bench.config, name, kv_dtype, context, total, reserve=0)
        row = {"format": name, "kv_dtype": kv_dtype, "context": context, "planned_bytes": planned.total}
        peak = None
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
            decoder = CudaDecoder(weights, cache_tokens=context, kv_dtype=kv_dtype, max_pass_tokens=planned.pass_tokens)
            decoder.forward([Chunk(decoder.new_sequence(context), [1] * context, "last")])
            peak = torch.cuda.max_memory_allocated(bench.device)
        yield row | {"peak_bytes": peak, "plan": describe(planned)}
