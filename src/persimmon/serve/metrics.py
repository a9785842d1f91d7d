"""Prometheus metrics of one server. Names follow vLLM's with our prefix, so that dashboards are easily moved."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from persimmon.infer.engine import Update
from persimmon.serve.submission import Ticket, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass
class _Times:
    """When things happened to a request, in seconds of the monotonic clock."""

    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0


class _EngineCollector:
    """Reads the engine's own state when asked."""

    def __init__(self, worker: Worker, model: str) -> None:
        self._worker, self._model = worker, model

    def collect(self) -> Iterable[Metric]:
        """The metrics of this moment."""
        state = self._worker.state
        gauges = {
            "num_requests_running": ("Requests that hold a place in the batch.", state.running),
            "num_requests_waiting": ("Requests that wait for one.", max(0, self._worker.in_flight - state.running)),
            "kv_cache_usage_perc": ("Share of the cache in use, 0 to 1.", state.blocks_held / max(1, state.blocks)),
        }  # fmt: skip
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the cache.", state.prompt_tokens_queried),
            "prefix_cache_hits": ("Prompt tokens found there.", state.prompt_tokens_found),
            "preemptions": ("Requests sent back for lack of cache.", state.preemptions),
            "computed_tokens": ("Tokens run through the model.", state.tokens_computed),
            "engine_restarts": ("Engine processes that were replaced.", self._worker.restarts),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"persimmon_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"persimmon_{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        active = GaugeMetricFamily(
            "persimmon_ffn_active_fraction", "Share of MLP values that are not zero.", labels=["model_name", "layer"]
        )
        for layer, share in enumerate(state.active_fraction):
            active.add_metric([self._model, str(layer)], share)
        yield active


class _TokenCollector:
    """What every token changes, in plain numbers: the library's own counters take several locks for each of them."""

    def __init__(self, model: str) -> None:
        self._model, self._created = model, time.time()
        self._tokens, self._seconds = 0, 0.0
        self._buckets = [0] * (len(_SECONDS) + 1)

    def count(self, tokens: int, seconds: float | None) -> None:
        """Tokens of a piece, which share the seconds since the piece before; None for the first piece."""
        self._tokens += tokens
        if seconds is not None:
            self._seconds += seconds
            self._buckets[bisect_left(_SECONDS, seconds / tokens)] += tokens

    def collect(self) -> Iterable[Metric]:
        """The metrics of this moment."""
        tokens = CounterMetricFamily("persimmon_generation_tokens", "Tokens generated.", labels=["model_name"])
        tokens.add_metric([self._model], self._tokens, self._created)
        yield tokens
        name = "persimmon_inter_token_latency_seconds"
        between = HistogramMetricFamily(name, "Between tokens of one answer.", labels=["model_name"])
        limits = [*map(floatToGoString, _SECONDS), "+Inf"]
        sums = list(zip(limits, itertools.accumulate(self._buckets), strict=True))
        between.add_metric([self._model], sums, self._seconds)
        between.add_sample(f"{name}_created", {"model_name": self._model}, self._created)
        yield between


class Metrics:
    """Counts what the worker reports."""

    def __init__(self, worker: Worker, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(worker, model))
        self._tokens = _TokenCollector(model)
        self._registry.register(self._tokens)
        self._model = model
        self._times: dict[Ticket, _Times] = {}
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._finished = self._counter("request_success", "Requests that ended with an answer.", "finished_reason")
        self._failed = self._counter("request_failure", "Requests that ended with an error.", "kind")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._queued = self._histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._reading = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._answering = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        worker.on_update, worker.on_cancel = self.observe, self.forget

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def forget(self, ticket: Ticket) -> None:
        """A request was cancelled."""
        self._times.pop(ticket, None)

    def observe(self, ticket: Ticket, update: Update) -> None:
        """Count one update of a request."""
        now = time.monotonic()
        times = self._times.get(ticket)
        if times is None:
            times = self._times[ticket] = _Times()
        if times.started is None and update.prompt_done:
            times.started = now
            self._queued.observe(now - ticket.submitted_at)
        if update.piece is not None and update.piece.token_ids:
            self._count_piece(ticket, times, len(update.piece.token_ids), now)
        if update.failure is not None:
            self._failed.labels(self._model, update.failure.kind).inc()
        if update.finish_reason is not None and update.usage is not None:
            self._prompt_tokens.inc(update.usage.prompt_tokens)
            self._finished.labels(self._model, update.finish_reason).inc()
            self._whole.observe(now - ticket.submitted_at)
            self._answering.observe(now - (times.first_token or now))
        if update.failure is not None or update.finish_reason is not None:
            self.forget(ticket)

    def _count_piece(self, ticket: Ticket, times: _Times, count: int, now: float) -> None:
        self._tokens.count(count, None if times.last_token is None else now - times.last_token)
        if times.first_token is None:
            times.first_token = now
            self._first.observe(now - ticket.submitted_at)
            self._reading.observe(now - (times.started or now))
        times.last_token = now

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"persimmon_{name}", text, ["model_name", *labels], registry=self._registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        labels = ["model_name"]
        histogram = Histogram(f"persimmon_{name}", text, labels, buckets=_SECONDS, registry=self._registry)
        return histogram.labels(self._model)
