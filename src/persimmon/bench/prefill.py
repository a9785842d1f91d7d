"""Reading prompts: tokens per second by length, against the rate of the machine's matrix products."""

from __future__ import annotations

from typing import Any

from persimmon.bench.ceiling import Ceiling
from persimmon.bench.decode import against_fields
from persimmon.bench.peers import Peer
from persimmon.bench.row import Row, finished
from persimmon.bench.subject import Subject, random_ids
from persimmon.bench.timing import Stopwatch, Summary, alternate, percent_of, repeat
from persimmon.bench.traffic import prefill_flops, prompt_bytes
from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError
from persimmon.fast.cpu.memory import STEP_TOKENS
from persimmon.infer.decoder import Chunk

_WARM_UP = 16  # tokens


def check_length(config: ModelConfig, length: int) -> None:
    """Raise ContextLengthError for a prompt that the model has no positions for."""
    if length > config.max_positions:
        raise ContextLengthError(f"a prompt of {length} tokens exceeds the model's {config.max_positions} positions")


class Reading:
    """A prompt of random tokens, read anew by every run."""

    def __init__(self, subject: Subject, length: int) -> None:
        check_length(subject.config, length)
        self._decoder, self._ids = subject.decoder, random_ids(subject.config, length, 0)
        self._read(self._ids[:_WARM_UP])

    def run(self) -> float:
        """Tokens per second, up to the logits behind the last."""
        return self._read(self._ids)

    def _read(self, ids: list[int]) -> float:
        sequence = self._decoder.new_sequence(len(ids))
        try:
            with Stopwatch() as watch:
                self._decoder.forward([Chunk(sequence, ids)], exact_top=1)
        finally:
            sequence.close()
        return len(ids) / watch.seconds


def prefill_row(subject: Subject, lengths: list[int], runs: int, ceiling: Ceiling, peers: dict[int, Peer]) -> Row:
    """Measure every length, alone or in turns with its peer; the row's own figures are those of the last length."""
    measured: list[dict[str, Any]] = []
    for length in lengths:
        reading = Reading(subject, length)
        if length in peers:
            pairs = alternate(reading.run, peers[length].run, runs)
            ours, against = pairs.ours, against_fields(peers[length], pairs.peer, pairs.ratios)
        else:
            ours, against = repeat(reading.run, runs), {}
        measured.append(_figures(subject, length, ours) | against)
    limit = ceiling.again()
    for entry in measured:
        most = limit.value * 1e9 * entry["context"] / entry["flops"]
        entry |= {
            "ceiling_tokens_per_second": most,
            "percent_of_ceiling": percent_of(entry["tokens_per_second"], most),
        }
    return finished(
        {
            "bench": "prefill",
            **subject.facts(),
            **measured[-1],
            "bandwidth_gb_s": None,
            "gemm_gflops": {limit.method: limit.value, **limit.others},
            "lengths": measured,
        }
    )


def _figures(subject: Subject, length: int, ours: Summary) -> dict[str, Any]:
    step = STEP_TOKENS if subject.decoder.name == "cpu" else length
    read = prompt_bytes(subject.config, subject.weight_format, subject.kv_dtype, length, step) / length
    return {
        "context": length,
        "tokens_per_second": ours.median,
        "runs": list(ours.values),
        "bytes_per_token": read,
        "bytes_per_token_dense": read,
        "flops": prefill_flops(subject.config, length),
    }
