"""How well a model predicts whole documents, overall and by position in the context.

With `--rotary-precision float32` and `bfloat16` in one comparison this tells which of the two a checkpoint was trained
with (docs/numerics.md): they part with growing position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from persimmon.evals.tasks.task import (
    Measure,
    Outcome,
    Question,
    Record,
    Response,
    Source,
    Style,
    Task,
    TokenLikelihoods,
)

BUCKETS = ((0, 256), (256, 1_024), (1_024, 2_048), (2_048, 4_096), (4_096, 8_192), (8_192, 16_384))
"""Positions of the predicted tokens. The first ends where bfloat16 stops to count exactly."""


def bucket_name(start: int, end: int) -> str:
    """The metric of one bucket: mean negative log-likelihood per token, in nats."""
    return f"nats[{start},{end})"


def _ask(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    return Question((Measure(record["text"]),), None)


def _judge(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
    measured = responses[0]
    assert isinstance(measured, TokenLikelihoods)
    nats = [-value for value in measured.log_probabilities]
    metrics = {
        "bits_per_byte": sum(nats) / math.log(2) / max(1, measured.num_bytes),
        "nats_per_token": sum(nats) / max(1, len(nats)),
    }
    weights = {"bits_per_byte": float(measured.num_bytes), "nats_per_token": float(len(nats))}
    for start, end in BUCKETS:
        inside = nats[start:end]
        name = bucket_name(start, end)
        metrics[name] = sum(inside) / max(1, len(inside))
        weights[name] = float(len(inside))
    return Outcome(metrics, weights=weights)


_METRICS = ("bits_per_byte", "nats_per_token", *(bucket_name(*bucket) for bucket in BUCKETS))

TASK = Task(
    name="perplexity",
    title="Perplexity",
    version=1,
    source=Source("documents", "", None, "", dict),
    styles={"loglikelihood": Style("likelihood of every token", 0, _METRICS, _ask, _judge)},
)
