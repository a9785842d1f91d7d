"""What quantizing cost: the same text through the source and the packed model, compared token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.errors import InputError
from persimmon.infer.decoder import Chunk, Decoder

WINDOW = 512  # tokens that are read as one sequence
_STEP = 64  # tokens whose logits exist at once: 64 MiB per model with the 8B's vocabulary


@dataclass(frozen=True)
class Fidelity:
    """How far a model is from its source on a text; means over `tokens` predictions."""

    tokens: int
    source_perplexity: float
    perplexity: float
    kl: float
    """Divergence of the model's distribution from the source's, in nats per token."""
    top1_agreement: float
    """Share of positions at which both find the same token the most likely."""

    @property
    def perplexity_change(self) -> float:
        """Relative to the source: 0.01 is one percent worse."""
        return self.perplexity / self.source_perplexity - 1


def compare(
    source: Decoder, model: Decoder, token_ids: Sequence[int], progress: ProgressReport = no_progress
) -> Fidelity:
    """Run the text through both in windows of 512 tokens that each begin anew.

    token_ids: at least two. progress: called with (tokens done, tokens in all).
    Raises InputError for less text, or for models of different vocabularies.
    """
    if source.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the vocabularies differ: {source.config.vocab_size} and {model.config.vocab_size} rows cannot be compared"
        )
    if len(token_ids) < 2:
        raise InputError(f"a comparison needs a text of 2 tokens or more, got {len(token_ids)}")
    window = min(WINDOW, source.config.max_positions, model.config.max_positions)
    sums, count = np.zeros(4), 0
    for start in range(0, len(token_ids) - 1, window):
        piece = token_ids[start : start + window + 1]
        for targets, expected, found in _steps(source, model, piece):
            sums += _differences(targets, expected, found)
            count += len(targets)
            progress(count, len(token_ids) - 1)
    source_loss, loss, kl, agreed = (float(value) / count for value in sums)
    return Fidelity(count, math.exp(source_loss), math.exp(loss), kl, agreed)


_Step = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


def _steps(source: Decoder, model: Decoder, token_ids: Sequence[int]) -> Iterator[_Step]:
    """(next tokens [T], log-probabilities of the source and of the model [T, V]) a few tokens at a time."""
    inputs = token_ids[:-1]
    sequences = [decoder.new_sequence(len(inputs)) for decoder in (source, model)]
    try:
        for start in range(0, len(inputs), _STEP):
            chunk = inputs[start : start + _STEP]
            both = [
                _log_probabilities(decoder.forward([Chunk(sequence, chunk, "all")])[0])
                for decoder, sequence in zip((source, model), sequences, strict=True)
            ]
            yield np.asarray(token_ids[start + 1 : start + 1 + len(chunk)]), both[0], both[1]
    finally:
        for sequence in sequences:
            sequence.close()


def _log_probabilities(logits: NDArray[np.float32] | None) -> NDArray[np.float64]:
    assert logits is not None  # "all" was asked for
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _differences(
    targets: NDArray[np.int64], expected: NDArray[np.float64], found: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sums over the tokens: the losses of source and model in nats, the divergence, the agreements."""
    rows = np.arange(len(targets))
    divergence = (np.exp(expected) * (expected - found)).sum()
    agreed = (expected.argmax(axis=-1) == found.argmax(axis=-1)).sum()
    return np.array([-expected[rows, targets].sum(), -found[rows, targets].sum(), divergence, agreed])
