"""The parts of a decoded token, each against read bandwidth, measured in place: inside the engine, on its threads.

A part's time is the difference between two models that differ in that part alone (a layer with and without its MLP), or
between two calls of one model (with and without logits; at two depths). Layers are copies of one packed random layer,
so many of them that no cache holds them. What an active share costs is measured by moving the bias of the up
projection; random neurons fire independently of each other, which trained ones do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.bench.ceiling import Ceiling
from persimmon.bench.row import Row, finished, kernels_fields
from persimmon.bench.subject import random_ids
from persimmon.bench.timing import Stopwatch, percent_of
from persimmon.bench.traffic import MlpUse, all_neurons, counted_neurons, head_bytes, mlp_bytes
from persimmon.config import ModelConfig
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.formats import FORMATS, Format, row_bytes
from persimmon.fast.cpu.memory import kv_bytes_per_token
from persimmon.fast.cpu.packing import Packer
from persimmon.fast.cpu.synthesize import SyntheticSource
from persimmon.fast.cpu.weights import arrange, to_bfloat16
from persimmon.infer.decoder import Chunk

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.98)
"""Of active neurons."""

LAYER_BYTES = 1 << 30
"""Least bytes of all layers together, beyond any cache."""

_SMALL_MLP = 256  # neurons of the layers that are measured without an MLP: one superblock
_TOKENS = 8  # timed tokens of a run
_DEPTHS = (16, 2_048)  # tokens in the cache
_SHORT = 16


@dataclass(frozen=True)
class Part:
    """One kernel's share of a token."""

    name: str
    seconds: float
    num_bytes: float

    @property
    def gb_s(self) -> float:
        """Bytes over time; 0 where the difference drowned in noise."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Setting:
    """Shape and effort of the measurement."""

    config: ModelConfig
    """Its number of layers and vocabulary are not used."""
    threads: int
    runs: int
    layer_bytes: int = LAYER_BYTES
    vocab_size: int = 65_536
    depths: tuple[int, int] = _DEPTHS
    shares: tuple[float, ...] = SHARES


class Arrays:
    """The arrays of a random model in one format, with `num_layers` copies of one layer."""

    def __init__(self, setting: Setting, form: Format, intermediate: int, vocab: int) -> None:
        one = setting.config.replace(
            num_layers=1, intermediate_size=intermediate, vocab_size=vocab, bos_token_id=0, eos_token_id=0
        )
        source = SyntheticSource(one, 0.5, 0)
        if form.packed:
            packer = Packer(source, one, form, setting.threads, None)
            layer, head = packer.layer(0), packer.head()
        else:
            everything = arrange(one, form, _reader(source, form))
            head = {name: a for name, a in everything.items() if name.startswith(("lm_head", "final_layernorm"))}
            layer = {name: a for name, a in everything.items() if name.startswith("layers.0.")}
        size = sum(array.nbytes for array in layer.values())
        count = max(1, -(-setting.layer_bytes // size))
        self.form, self.config = form, one.replace(num_layers=count)
        rows = next(part for _, part in source.rows("embed_tokens.weight"))
        few: NDArray[Any] = rows if form.name == "float32" else to_bfloat16(rows)
        self.arrays = {"embed_tokens.weight": np.resize(few, (vocab, one.hidden_size)), **head}
        for index in range(count):
            for name, array in layer.items():
                copy = array if index == 0 else array.copy()
                self.arrays[name.replace("layers.0.", f"layers.{index}.", 1)] = copy

    def set_active(self, share: float) -> None:
        """Bias of every up projection such that this share of the neurons is positive."""
        bias = SyntheticSource(self.config.replace(num_layers=1), share, 0).vector("layers.0.mlp.dense_h_to_4h.bias")
        for index in range(self.config.num_layers):
            self.arrays[f"layers.{index}.mlp.dense_h_to_4h.bias"] = bias

    def decoder(self, threads: int) -> CpuDecoder:
        """The engine over them."""
        return CpuDecoder(self.config, self.form, self.arrays, threads=threads, kv_dtype="int8")


def _reader(source: SyntheticSource, form: Format) -> Any:
    def read(name: str) -> Any:
        if name.endswith((".bias", "layernorm.weight")):
            return source.vector(name)
        whole = np.concatenate([rows for _, rows in source.rows(name)])
        return to_bfloat16(whole) if form.name == "bfloat16" else whole

    return read


def token_seconds(decoder: CpuDecoder, runs: int, *, depth: int = _SHORT, logits: bool = False) -> float:
    """Median seconds of one decoded token at a depth, with or without the vocabulary head."""
    sequence = decoder.new_sequence(depth + _TOKENS)
    wanted = "last" if logits else "none"
    try:
        decoder.forward([Chunk(sequence, random_ids(decoder.config, depth, 0), "none")])
        seconds = []
        for _ in range(runs + 1):
            with Stopwatch() as watch:
                for _ in range(_TOKENS):
                    decoder.forward([Chunk(sequence, [0], wanted)], exact_top=1)  # type: ignore[arg-type]
            seconds.append(watch.seconds / _TOKENS)
            sequence.truncate(depth)
        return float(median(seconds[1:]))
    finally:
        sequence.close()


def attention_matrices(setting: Setting, form: Format) -> tuple[Part, float]:
    """The four projections of attention, and the seconds per layer of everything that is not the MLP."""
    model = Arrays(setting, form, _SMALL_MLP, _SMALL_MLP)
    seconds = token_seconds(model.decoder(setting.threads), setting.runs) / model.config.num_layers
    hidden = model.config.hidden_size
    size = 4 * hidden * row_bytes(form.attention, hidden) + mlp_bytes(model.config, form, _small_use(model.config))
    return Part(f"attention projections, {form.attention}", seconds, size), seconds


def _small_use(config: ModelConfig) -> MlpUse:
    half = config.intermediate_size / 2  # of random neurons, and then hardly a group is silent
    return MlpUse(half, half, all_neurons(config)[0].groups)


def mlp_parts(setting: Setting, form: Format, rest: float) -> Iterator[tuple[float, Part]]:
    """(share of active neurons as counted, the MLP of a layer) for every share."""
    model = Arrays(setting, form, setting.config.intermediate_size, _SMALL_MLP)
    for share in setting.shares:
        model.set_active(share)
        decoder = model.decoder(setting.threads)
        seconds = token_seconds(decoder, setting.runs) / model.config.num_layers - rest
        uses = counted_neurons(decoder.layer_counts(), model.config)
        use = MlpUse(*(_mean([getattr(u, field) for u in uses]) for field in ("candidates", "active", "groups")))
        active = use.active / model.config.intermediate_size
        yield active, Part(f"MLP, {form.name}", seconds, mlp_bytes(model.config, form, use))


def head_and_depth(setting: Setting, form: Format) -> Iterator[Part]:
    """The vocabulary head for the most likely token, and attention over the cache at depth."""
    few = Setting(setting.config, setting.threads, setting.runs, layer_bytes=1, vocab_size=setting.vocab_size)
    model = Arrays(few, form, _SMALL_MLP, setting.vocab_size)
    decoder = model.decoder(setting.threads)
    without, with_head = (token_seconds(decoder, setting.runs, logits=logits) for logits in (False, True))
    yield Part("vocabulary head, two passes", with_head - without, head_bytes(model.config, form, 0))
    shallow, deep = setting.depths
    seconds = token_seconds(decoder, setting.runs, depth=deep) - token_seconds(decoder, setting.runs, depth=shallow)
    size = (deep - shallow) * kv_bytes_per_token(model.config, "int8")
    yield Part(f"attention over {deep} int8 keys and values", seconds, size)


def break_even(points: Sequence[tuple[float, float]], dense_seconds: float) -> float | None:
    """The share of active neurons at which a sparse MLP takes as long as a dense one, between measured points.

    points: (share, seconds), ascending. None when it is never as slow; 0 when it always is.
    """
    if not points or points[0][1] >= dense_seconds:
        return 0.0 if points else None
    for (share, seconds), (next_share, next_seconds) in pairwise(points):
        if next_seconds >= dense_seconds:
            return share + (dense_seconds - seconds) / (next_seconds - seconds) * (next_share - share)
    return None


def kernels_row(setting: Setting, formats: Sequence[str], ceiling: Ceiling) -> Row:
    """Measure every part in every format, and where skipping stops paying."""
    table: list[dict[str, Any]] = []
    sparse: dict[str, list[tuple[float, float]]] = {}
    dense_q4 = None
    for name in formats:
        form = FORMATS[name]
        part, rest = attention_matrices(setting, form)
        if part.name not in {entry["kernel"] for entry in table}:  # p44 has q4's
            table.append(_entry(part))
        for active, mlp in mlp_parts(setting, form, rest):
            table.append(_entry(mlp) | {"active_share": active})
            if form.mlp == "q4":
                dense_q4 = mlp.seconds  # the last is that of nearly all neurons
            else:
                sparse.setdefault(name, []).append((active, mlp.seconds))
    packed = next((FORMATS[name] for name in formats if FORMATS[name].packed), None)
    if packed is not None:
        table += [_entry(part) for part in head_and_depth(setting, packed)]
    bandwidth = ceiling.again()
    for entry in table:
        entry["percent_of_bandwidth"] = percent_of(entry["gb_s"], bandwidth.value)
    return finished(_row(setting, formats, table, sparse, dense_q4, bandwidth.value))


def _row(
    setting: Setting,
    formats: Sequence[str],
    table: list[dict[str, Any]],
    sparse: dict[str, list[tuple[float, float]]],
    dense_q4: float | None,
    bandwidth: float,
) -> Row:
    """The row; its tokens per second are layers per second of the fastest kernel's first entry."""
    return {
        **kernels_fields(setting.config, formats, table, bandwidth),
        "engine": "cpu",
        "threads": setting.threads,
        "context": setting.depths[1],
        "break_even": {
            "dense": "q4",
            **{name: break_even(points, dense_q4) for name, points in sparse.items() if dense_q4 is not None},
        },
    }


def _entry(part: Part) -> dict[str, Any]:
    # A difference of two medians can come out at or below zero when others use the machine; it is shown as it is.
    return {
        "kernel": part.name,
        "microseconds": 1e6 * part.seconds,
        "num_bytes": part.num_bytes,
        "gb_s": part.gb_s,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
