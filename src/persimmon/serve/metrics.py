"""Prometheus metrics of one server. Names follow vLLM's with our prefix, so that dashboards are easily moved."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

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


class Metrics:
    """Counts what the worker reports."""

    def __init__(self, worker: Worker, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(worker, model))
        self._model = model
        self._times: dict[Ticket, _Times] = {}
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._answer_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._finished = self._counter("request_success", "Requests that ended with an answer.", "finished_reason")
        self._failed = self._counter("request_failure", "Requests that ended with an error.", "kind")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens of one answer.")
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
        times = self._times.setdefault(ticket, _Times())
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
        self._answer_tokens.inc(count)
        if times.first_token is None or times.last_token is None:
            times.first_token = now
            self._first.observe(now - ticket.submitted_at)
            self._reading.observe(now - (times.started or now))
        else:
            for _ in range(count):  # tokens of one piece share the time since the last
                self._between.observe((now - times.last_token) / count)
        times.last_token = now

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"persimmon_{name}", text, ["model_name", *labels], registry=self._registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        labels = ["model_name"]
        histogram = Histogram(f"persimmon_{name}", text, labels, buckets=_SECONDS, registry=self._registry)
        return histogram.labels(self._model)
