"""Serving: latency and throughput by number of clients, and what the server's memory does meanwhile. No torch.

The clients run on the same machine and take their share of it, for us and for the peer alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persimmon.accounting import decoding_flops_per_token
from persimmon.bench.ceiling import Ceiling
from persimmon.bench.load import Address, Load, Outcome, run_load
from persimmon.bench.row import Row, finished
from persimmon.bench.servers import RssWatch, cache_share_held
from persimmon.bench.timing import Summary, percent_of, percentile
from persimmon.config import ModelConfig
from persimmon.errors import UnavailableError

WARM_UP_SECONDS = 2.0
"""Of one client, before anything counts."""


@dataclass(frozen=True)
class Target:
    """A server that is asked."""

    name: str
    address: Address
    pid: int | None = None
    """Where its memory is to be watched."""


@dataclass(frozen=True)
class ServeWork:
    """The levels of load, and how often each is run."""

    levels: tuple[int, ...]
    runs: int
    load: Load
    """Of any level; its number of clients is replaced."""


@dataclass
class Level:
    """All runs at one number of clients, of one server."""

    clients: int
    outcomes: list[Outcome]

    @property
    def rates(self) -> Summary:
        """Tokens per second by run."""
        return Summary(tuple(outcome.tokens_per_second for outcome in self.outcomes))

    def facts(self) -> dict[str, Any]:
        """Figures over all runs."""
        first = [seconds for outcome in self.outcomes for seconds in outcome.first_token]
        between = [seconds for outcome in self.outcomes for seconds in outcome.between]
        errors = [error for outcome in self.outcomes for error in outcome.errors]
        return {
            "clients": self.clients,
            "tokens_per_second": self.rates.median,
            "runs": list(self.rates.values),
            "requests_finished": sum(outcome.finished for outcome in self.outcomes),
            "requests_dropped": sum(outcome.dropped for outcome in self.outcomes),
            "errors": len(errors),
            "first_errors": errors[:3],
            **_quantiles("first_token_seconds", first),
            **_quantiles("inter_token_seconds", between),
        }


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    shares = {"p50": 0.5, "p95": 0.95}
    return {f"{name}_{word}": percentile(values, share) if values else None for word, share in shares.items()}


def measure_levels(ours: Target, peer: Target | None, work: ServeWork) -> tuple[list[Level], list[Level]]:
    """(our levels, the peer's): at every level in turns, ours first."""
    for target in filter(None, (ours, peer)):
        run_load(target.address, dataclasses.replace(work.load, clients=1, seconds=WARM_UP_SECONDS, disconnects=0.0))
    mine, theirs = [], []
    for clients in work.levels:
        load = dataclasses.replace(work.load, clients=clients)
        level, other = Level(clients, []), Level(clients, [])
        for _ in range(work.runs):
            level.outcomes.append(run_load(ours.address, load))
            if peer is not None:
                other.outcomes.append(run_load(peer.address, load))
        _check_answered(ours, level)
        mine.append(level)
        if peer is not None:
            _check_answered(peer, other)
            theirs.append(other)
    return mine, theirs


def _check_answered(target: Target, level: Level) -> None:
    if not any(outcome.tokens for outcome in level.outcomes):
        errors = [error for outcome in level.outcomes for error in outcome.errors]
        raise UnavailableError(
            f"{target.name} answered nothing to {level.clients} clients: {errors[0] if errors else 'too slow'}"
        )


def serve_row(
    facts: dict[str, Any], config: ModelConfig, ours: Target, peer: Target | None, work: ServeWork, ceiling: Ceiling
) -> Row:
    """Measure all levels and put the figures together; the row's own are those of the last level."""
    watch = RssWatch(ours.pid) if ours.pid is not None else None
    with watch or contextlib.nullcontext():
        mine, theirs = measure_levels(ours, peer, work)
    held = cache_share_held(ours.address)
    limit = ceiling.again()
    context = max(map(len, work.load.prompts))
    most = limit.value * 1e9 / decoding_flops_per_token(config, context)
    samples = watch.samples if watch else []
    last = mine[-1].rates
    return finished(
        {
            "bench": "serve",
            **facts,
            "context": context,
            "tokens": work.load.max_tokens,
            "clients": list(work.levels),
            "disconnects": work.load.disconnects,
            "tokens_per_second": last.median,
            "runs": list(last.values),
            "bytes_per_token": None,
            "bytes_per_token_dense": None,
            "bandwidth_gb_s": None,
            "gemm_gflops": {limit.method: limit.value, **limit.others},
            "ceiling_tokens_per_second": most,
            "percent_of_ceiling": percent_of(last.median, most),
            "peak_rss_bytes": max(samples, default=0),
            "server_rss_bytes": samples,
            "cache_share_held_at_rest": held,
            "levels": [level.facts() for level in mine],
            **(_against(peer, mine, theirs) if peer is not None else {}),
        }
    )


def _against(peer: Target, mine: Sequence[Level], theirs: Sequence[Level]) -> dict[str, Any]:
    """Ratios of throughput, pair by pair; the row's own are those of the last level."""
    ratios = [
        Summary(tuple(a / max(b, 1e-9) for a, b in zip(level.rates.values, other.rates.values, strict=True)))
        for level, other in zip(mine, theirs, strict=True)
    ]
    return {
        "ratio": ratios[-1].median,
        "ratio_min": ratios[-1].low,
        "ratio_max": ratios[-1].high,
        "ratios_by_clients": {str(level.clients): ratio.median for level, ratio in zip(mine, ratios, strict=True)},
        "peer": {
            "name": peer.name,
            "tokens_per_second": theirs[-1].rates.median,
            "levels": [level.facts() for level in theirs],
        },
    }
