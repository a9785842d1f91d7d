"""Decoding: batches and contexts, sparse against dense end to end, and what follows from their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import arithmetic
import torch
from cases import Bench, Case
from quality import TIE

from persimmon.fast.cuda.choice import DENSE, SPARSE, KernelTable
from persimmon.fast.cuda.decoder import CudaDecoder, CudaSequence
from persimmon.fast.cuda.network import Network
from persimmon.fast.cuda.plan import device_kv_bytes_per_token
from persimmon.fast.cuda.runner import Piece, Runner
from persimmon.fast.cuda.synthesize import all_matrices
from persimmon.fast.cuda.weights import Layer, Weights
from persimmon.infer.decoder import Chunk
from persimmon.infer.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)

BATCH_REFERENCE = (
    "no published throughput of Persimmon under SGLang or an engine like it was found, nor of a model with its 64 "
    "key/value heads and 262,144 ids that bytes could scale: the figure stands alone"
)


def decode(bench: Bench) -> Iterator[Case]:
    """Tokens per second by format, cache, batch and context, with the bytes and the ceiling beside them."""
    for name in bench.formats:
        for batch, context in sizes(bench):
            key = {"format": name, "kv_dtype": bench.kv_dtype(name), "batch": batch, "room": context}
            yield Case(key, lambda name=name, batch=batch, context=context: decode_row(bench, name, batch, context))


def sizes(bench: Bench) -> Iterator[tuple[int, int]]:
    """Batch sizes at the shortest context, contexts at batch 1, and both large."""
    for batch in bench.batches:
        yield batch, bench.contexts[0]
    for context in bench.contexts[1:]:
        yield 1, context
    if len(bench.batches) > 1 and len(bench.contexts) > 2:
        yield bench.batches[-1], bench.contexts[1]


def decode_row(bench: Bench, name: str, batch: int, context: int) -> dict[str, Any]:
    """One case; `skipped` when its keys and values do not fit."""
    weights, kv_dtype, steps = bench.weights(name), bench.kv_dtype(name), bench.decode_tokens
    room = min(context + steps, bench.config.max_positions)
    cache_tokens = batch * (-(-room // 64) * 64)
    if bench.on_gpu:
        free, _ = torch.cuda.mem_get_info(bench.device)
        needed = cache_tokens * device_kv_bytes_per_token(bench.config, kv_dtype)
        if needed > 0.9 * free:
            return {"skipped": f"keys and values take {needed} bytes, {free} are free"}
    decoder = CudaDecoder(weights, cache_tokens=cache_tokens, kv_dtype=kv_dtype, table=bench.kernel_table())
    sequences = [decoder.new_sequence(room) for _ in range(batch)]
    start = room - steps
    # Rows of their own: copies of one would have the active neurons of one.
    first = [(1 + 97 * row) % bench.config.vocab_size for row in range(batch)]
    drawn: list[list[int]] = []

    def run() -> None:
        for sequence in sequences:
            sequence.grow(sequence.missing_blocks(max(0, start - sequence.length)))
            sequence.advance(max(0, start - sequence.length))  # the cache holds zeros: the traffic is the same
            sequence.truncate(start)
        drawn[:] = decoder.decode(sequences, first, [GREEDY] * batch, steps).token_ids.tolist()

    seconds = bench.median_seconds(run) / steps
    sparse = Network(weights, bench.kernel_table()).runs_sparse(batch)
    union = measured_union(decoder, sequences, [row[-1] for row in drawn]) if sparse else None
    return describe_row(bench, decoder, batch, start, seconds, union)


class CountingNetwork(Network):
    """Runs as Network does, and counts the neurons that any token of a pass has active."""

    def __init__(self, weights: Weights, table: KernelTable) -> None:
        super().__init__(weights, table)
        self.active = self.all = 0

    def _mlp(self, x: torch.Tensor, layer: Layer, index: int) -> torch.Tensor:
        self.active += int(self.hidden(x, layer).any(0).sum())
        self.all += layer.up.outputs
        return super()._mlp(x, layer, index)


def measured_union(decoder: CudaDecoder, sequences: list[CudaSequence], ids: list[int]) -> float:
    """Share of active neurons over all layers in a step of the batch."""
    network = CountingNetwork(decoder.weights, SPARSE)
    runner = Runner(network, decoder._runner().pool)
    runner.run([Piece(s.blocks, s.length - 1, [t], "last") for s, t in zip(sequences, ids, strict=True)])
    return round(network.active / network.all, 4)


def describe_row(
    bench: Bench, decoder: CudaDecoder, batch: int, context: int, seconds: float, union: float | None
) -> dict[str, Any]:
    """A row of the decode section. union: active neurons of the batch, None where the MLP runs dense."""
    weights = decoder.weights
    down = sum(layer.down.num_bytes for layer in weights.layers)
    step = arithmetic.StepBytes(
        sum(matrix.num_bytes for matrix in all_matrices(weights)),
        round(down * (1 - union)) if union is not None else 0,
        batch * context * device_kv_bytes_per_token(bench.config, decoder.kv_dtype),
    )
    ceiling = arithmetic.ceiling_tokens_per_second(step, batch, bench.ceiling("copy"))
    return {
        "context": context, "sparse_mlp": union is not None, "active_union": union,
        "tokens_per_second": round(batch / seconds, 2), "milliseconds_per_step": round(seconds * 1e3, 4),
        "bytes_per_step": step.total, "bytes_per_step_dense": step.dense,
        "ceiling_tokens_per_second": round(ceiling, 2),
        "percent_of_ceiling": arithmetic.percent(batch / seconds, ceiling),
    }  # fmt: skip


def pairs(bench: Bench) -> Iterator[Case]:
    """The whole model at batch 1, dense and sparse, from one prompt: the ids and the ratio of their speeds."""
    for name in bench.formats:
        if name != "q4":  # its down projection cannot skip
            yield Case({"format": name, "active": bench.active}, lambda name=name: pair_row(bench, name))


def pair_row(bench: Bench, name: str) -> dict[str, Any]:
    """Equal ids up to the tie rule (docs/gpu.md): sums of the two have another order."""
    steps = bench.decode_tokens * 2
    prompt = [(5 + 31 * i) % bench.config.vocab_size for i in range(24)]
    rates, ids = {}, {}
    decoders = {
        kind: CudaDecoder(bench.weights(name), cache_tokens=192, table=table)
        for kind, table in (("dense", DENSE), ("sparse", SPARSE))
    }
    for kind, decoder in decoders.items():
        sequence = decoder.new_sequence(len(prompt) + steps)
        decoder.forward([Chunk(sequence, prompt[:-1], "none")])

        def run(kind: str = kind, decoder: CudaDecoder = decoder, sequence: CudaSequence = sequence) -> None:
            sequence.truncate(len(prompt) - 1)
            ids[kind] = decoder.decode([sequence], prompt[-1:], [GREEDY], steps).token_ids[0].tolist()

        rates[kind] = steps / bench.median_seconds(run)
        sequence.close()
    row: dict[str, Any] = {f"{kind}_tokens_per_second": round(rate, 2) for kind, rate in rates.items()}
    row |= {
        "ratio": round(rates["sparse"] / rates["dense"], 3),
        "ids": steps,
        **first_difference(decoders, prompt, ids),
    }
    return row


def first_difference(
    decoders: dict[str, CudaDecoder], prompt: list[int], ids: dict[str, list[int]]
) -> dict[str, int | float | bool]:
    """Where the ids part, if they do, and how far apart the dense logits of the two ids are there."""
    parted = [i for i, (a, b) in enumerate(zip(ids["dense"], ids["sparse"], strict=True)) if a != b]
    if not parted:
        return {"equal_ids": True, "holds": True}
    at = parted[0]
    decoder = decoders["dense"]
    sequence = decoder.new_sequence(len(prompt) + at)
    logits = decoder.forward([Chunk(sequence, prompt + ids["dense"][:at], "last")])[0]
    assert logits is not None, "asked for"
    gap = float(logits[ids["dense"][at]] - logits[ids["sparse"][at]])
    bound = TIE * float(abs(logits).max())
    return {"equal_ids": False, "equal_before": at, "gap": gap, "tie_bound": bound, "holds": abs(gap) <= bound}


def ratios(bench: Bench) -> Iterator[Case]:
    """What follows from the rows of decoding: long against short contexts, and the largest batch."""
    rows = [row for row in bench.rows("decode") if "skipped" not in row]
    for name in bench.formats:
        alone = {row["room"]: row for row in rows if row["format"] == name and row["batch"] == 1}
        short, long = (alone.get(context) for context in (bench.contexts[0], bench.contexts[-1]))
        if short is not None and long is not None:
            key = {"what": "long against short context, batch 1", "format": name}
            yield Case(key, lambda short=short, long=long: long_row(short, long))
    for row in rows:
        if row["batch"] == bench.batches[-1] and row["room"] == bench.contexts[0]:
            key = {"what": f"batch {row['batch']}", "format": row["format"]}
            rate = {"tokens_per_second": row["tokens_per_second"], "reference": None, "note": BATCH_REFERENCE}
            yield Case(key, lambda rate=rate: rate)


def long_row(short: dict[str, Any], long: dict[str, Any]) -> dict[str, Any]:
    """Percent of the short context's speed, and what the bytes that must be read allow."""
    return {
        "contexts": [short["context"], long["context"]],
        "percent": arithmetic.percent(long["tokens_per_second"], short["tokens_per_second"]),
        "percent_by_bytes": arithmetic.percent(short["bytes_per_step"], long["bytes_per_step"]),
    }
