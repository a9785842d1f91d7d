"""Decoding: tokens per second of one or several sequences, one token a step, greedy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from persimmon.bench.ceiling import Ceiling
from persimmon.bench.filling import fill
from persimmon.bench.peers import Peer
from persimmon.bench.row import Row, finished
from persimmon.bench.subject import Subject
from persimmon.bench.timing import Stopwatch, Summary, alternate, percent_of, repeat
from persimmon.bench.traffic import Traffic
from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError, UnavailableError
from persimmon.infer.decoder import Chunk

WARM_STEPS = 4
"""Steps before the first timed one."""


@dataclass(frozen=True)
class DecodeWork:
    """What every run does."""

    depth: int
    """Tokens in the cache before the first timed one."""
    tokens: int
    """Timed steps."""
    batch: int = 1
    """Sequences side by side."""
    fill: str = "read"
    """How the cache is filled (see filling.py)."""

    def check(self, config: ModelConfig) -> None:
        """Raise ContextLengthError when depth and tokens do not fit."""
        limit = config.max_positions
        if self.depth + self.tokens > limit:
            raise ContextLengthError(
                f"{self.depth} tokens of context and {self.tokens} more exceed the model's {limit} positions"
            )

    @property
    def attended(self) -> float:
        """Tokens that a timed one attends to, on average: those before it and itself."""
        return self.depth + (self.tokens + 1) / 2


class Decoding:
    """Sequences filled to the depth; every run decodes from there and goes back."""

    def __init__(self, subject: Subject, work: DecodeWork) -> None:
        """Fill the cache. Raises ContextLengthError when depth and tokens do not fit."""
        work.check(subject.config)
        self.subject, self._work = subject, work
        self._cache = fill(subject, work.fill, work.depth, work.tokens, work.batch)
        self.head_rows = float(subject.config.vocab_size)
        """Logits per token that the last step computed exactly; the others are -inf."""
        self.warm_up()
        subject.reset_counts()

    def warm_up(self) -> None:
        """Page in the weights and start the threads."""
        self.run(min(self._work.tokens, WARM_STEPS))

    def run(self, steps: int | None = None) -> float:
        """Tokens per second, all sequences together."""
        steps = steps or self._work.tokens
        with Stopwatch() as watch:
            logits = self._cache.decode([1] * self._work.batch, steps)
        self.head_rows = float(np.mean([np.isfinite(row).sum() for row in logits]))
        self._cache.rewind()
        return steps * self._work.batch / watch.seconds

    def traffic(self) -> Traffic:
        """Bytes per token of the runs so far."""
        return self.subject.traffic(self._work.attended, self._work.batch, self.head_rows)

    def close(self) -> None:
        """Give the sequences' memory back."""
        self._cache.close()


class Ours:
    """Our side of a row: the model stays loaded, or, beside a peer that fills the memory, is loaded for each run."""

    def __init__(self, subject: Subject, work: DecodeWork, load: Callable[[], Subject] | None = None) -> None:
        """load: loads the model again; `subject`, of which the caller lets go, is not kept then."""
        self._kept = Decoding(subject, work) if load is None else None
        self._load, self._work = load, work

    def run(self) -> float:
        """Tokens per second; leaves what the run was and read."""
        decoding = self._kept if self._load is None else Decoding(self._load(), self._work)
        assert decoding is not None
        speed = decoding.run()
        self.facts, self.shares = decoding.subject.facts(), neuron_shares(decoding.subject)
        self.traffic = decoding.traffic()
        if self._kept is None:
            decoding.close()
        return speed

    def run_after_a_large_peer(self) -> float:
        """The same, with weights back in memory that the peer has pushed out."""
        if self._kept is not None:
            self._kept.subject.page_in()
            self._kept.warm_up()
        return self.run()

    def close(self) -> None:
        """Give the sequences' memory back."""
        if self._kept is not None:
            self._kept.close()


def decode_row(side: Ours, work: DecodeWork, runs: int, ceiling: Ceiling, peer: Peer | None) -> Row:
    """Measure, alone or in turns with a peer, and put the figures together."""
    if peer is None:
        ours, against = repeat(side.run, runs), {}
    else:
        pairs = alternate(side.run_after_a_large_peer if peer.restarts else side.run, peer.run, runs)
        ours, against = pairs.ours, against_fields(peer, pairs.peer, pairs.ratios)
    bandwidth = ceiling.again()
    most = bandwidth.value * 1e9 / side.traffic.read
    side.close()
    return finished(
        {
            "bench": "decode",
            **side.facts,
            "context": work.depth,
            "tokens": work.tokens,
            "batch": work.batch,
            "fill": work.fill,
            "tokens_per_second": ours.median,
            "runs": list(ours.values),
            "bytes_per_token": side.traffic.read,
            "bytes_per_token_dense": side.traffic.dense,
            "bandwidth_gb_s": bandwidth.value,
            "bandwidth_method": bandwidth.method,
            "ceiling_tokens_per_second": most,
            "percent_of_ceiling": percent_of(ours.median, most),
            **side.shares,
            **against,
        }
    )


def against_fields(peer: Peer, theirs: Summary, ratios: Summary) -> dict[str, Any]:
    """The fields that a comparison adds: the ratio is the median over pairs of neighbours."""
    return {
        "ratio": ratios.median,
        "ratio_min": ratios.low,
        "ratio_max": ratios.high,
        "ratios": list(ratios.values),
        "peer": {
            "name": peer.name,
            "tokens_per_second": theirs.median,
            "runs": list(theirs.values),
            **peer.facts,
        },
    }


def neuron_shares(subject: Subject) -> dict[str, float]:
    """Shares of the MLPs' neurons whose pre-activation was computed exactly, and that were active."""
    counts = [layer for layer in subject.counts or () if layer["tokens"] and layer["candidates"]]
    if not counts:
        return {}
    neurons = sum(layer["tokens"] for layer in counts) * subject.config.intermediate_size
    return {
        "candidate_share": sum(layer["candidates"] for layer in counts) / neurons,
        "active_share": sum(layer["active"] for layer in counts) / neurons,
    }


# -- start-up ------------------------------------------------------------------------------------------------

_STARTUP_PROMPT = 8  # tokens


def first_token_seconds(model: str, options: Mapping[str, Any], runs: int = 3) -> list[float]:
    """Seconds from the start of a process to the first token of a short prompt, by run, the page cache warm."""
    command = [sys.executable, "-m", "persimmon.bench.decode", model, json.dumps(dict(options))]
    seconds = []
    for _ in range(runs + 1):
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"the model did not start: {done.stderr.strip()[-300:]}")
        seconds.append(float(done.stdout) - started)
    return seconds[1:]


def startup_fields(seconds: list[float]) -> dict[str, Any]:
    """The fields that `--startup` adds."""
    return {"startup_seconds": median(seconds), "startup_runs": seconds}


def _start(model: str, options: Mapping[str, Any]) -> None:
    """Load, read a short prompt, pick a token, and print when that was."""
    from persimmon.bench.subject import load_subject, random_ids

    subject = load_subject(model, options)
    sequence = subject.decoder.new_sequence(2 * _STARTUP_PROMPT)
    (logits,) = subject.decoder.forward([Chunk(sequence, random_ids(subject.config, _STARTUP_PROMPT, 0))], exact_top=1)
    assert logits is not None and np.isfinite(logits.max()), "the last logits were asked for"
    print(time.monotonic())


if __name__ == "__main__":
    _start(sys.argv[1], json.loads(sys.argv[2]))
