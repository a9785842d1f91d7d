"""How far weight formats, precisions and sparsity margins move a model from its reference, token by token.

The guard for every approximation: on the same text the reference's and the variant's next-token distributions are
compared directly, which shows a shift long before task scores do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persimmon.errors import InputError
from persimmon.evals.language_model import MEASURE_CHUNK, DecoderLanguageModel
from persimmon.infer.decoder import Chunk


@dataclass(frozen=True)
class Fidelity:
    """A variant next to the reference on the same tokens."""

    name: str
    bits_per_byte: float
    perplexity: float
    """exp of the mean negative log-likelihood per token."""

    kl: float
    """Mean KL divergence reference || variant per token, in nats."""

    kl_max: float
    """The largest of one token."""

    top1_agreement: float
    """Share of positions where both find the same token likeliest."""

    num_tokens: int


def measure(
    reference: DecoderLanguageModel, variants: Sequence[tuple[str, DecoderLanguageModel]], texts: Sequence[str]
) -> list[Fidelity]:
    """Fidelity of every variant (the reference itself may be one) over all texts, each cut to the context.

    Raises InputError when a variant has another vocabulary or there is no text.
    """
    for name, variant in variants:
        if variant.tokenizer.serialized != reference.tokenizer.serialized:
            raise InputError(f"{name} has another vocabulary than the reference")
    tokenizer = reference.tokenizer
    context = min(model.context for model in (reference, *(variant for _, variant in variants)))
    documents = [tokenizer.encode(text, bos=True)[: context + 1] for text in texts]
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise InputError("no text to compare the formats on")
    num_bytes = sum(len(tokenizer.piece_bytes(token)) for ids in documents for token in ids[1:])
    sums = [_Sums() for _ in variants]
    for ids in documents:
        _compare(reference, [variant for _, variant in variants], ids, sums)
    return [total.finish(name, num_bytes) for (name, _), total in zip(variants, sums, strict=True)]


class _Sums:
    """What is summed over tokens for one variant."""

    def __init__(self) -> None:
        self.nats = self.kl = self.kl_max = 0.0
        self.agreed = self.tokens = 0

    def add(self, expected: NDArray[np.float64], got: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        """Log-probabilities [T, V] of the reference and the variant, and the next tokens [T]."""
        probability = np.exp(expected)
        # A variant may have given up tokens (-inf); where the reference gives them nothing either, they cost nothing.
        with np.errstate(invalid="ignore"):
            terms = np.where(probability > 0, probability * (expected - got), 0.0)
        divergence = terms.sum(axis=1)
        self.kl += float(divergence.sum())
        self.kl_max = max(self.kl_max, float(divergence.max()))
        self.nats -= float(got[np.arange(len(targets)), targets].sum())
        self.agreed += int((expected.argmax(axis=1) == got.argmax(axis=1)).sum())
        self.tokens += len(targets)

    def finish(self, name: str, num_bytes: int) -> Fidelity:
        """The means."""
        mean = self.nats / self.tokens
        return Fidelity(
            name,
            self.nats / math.log(2) / num_bytes,
            math.exp(min(mean, 700.0)),
            self.kl / self.tokens,
            self.kl_max,
            self.agreed / self.tokens,
            self.tokens,
        )


def _compare(
    reference: DecoderLanguageModel,
    variants: Sequence[DecoderLanguageModel],
    ids: Sequence[int],
    sums: Sequence[_Sums],
) -> None:
    models = [reference, *(variant for variant in variants if variant is not reference)]
    sequences = [model.decoder.new_sequence(len(ids) - 1) for model in models]
    for start in range(0, len(ids) - 1, MEASURE_CHUNK):
        part = list(ids[start : min(start + MEASURE_CHUNK, len(ids) - 1)])
        targets = np.asarray(ids[start + 1 : start + 1 + len(part)])
        rows: dict[int, NDArray[np.float64]] = {}
        for model, sequence in zip(models, sequences, strict=True):
            (logits,) = model.decoder.forward([Chunk(sequence, part, "all")])
            assert logits is not None
            rows[id(model)] = _log_softmax(logits)
        for total, variant in zip(sums, variants, strict=True):
            total.add(rows[id(reference)], rows[id(variant)], targets)
    for sequence in sequences:
        sequence.close()


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    normalized: NDArray[np.float64] = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return normalized
