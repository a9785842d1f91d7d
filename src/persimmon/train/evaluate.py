"""Bits per byte on held-out documents: the loss of a language model in units that no vocabulary can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer


def windows(length: int, window: int, context: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) ranges covering positions 0 .. length once, each with `context` tokens before it."""
    if not 0 <= context < window:
        raise ValueError(f"context {context} must be in [0, window {window})")
    ranges, scored = [], 0
    while scored < length:
        start = max(0, scored - context)
        end = min(length, start + window)
        ranges.append((start, end, scored))
        scored = end
    return ranges


@torch.no_grad()  # not inference_mode: weights that FSDP2 gathers here are used in training again
def document_bits(model: PersimmonModel, token_ids: Sequence[int], *, window: int) -> float:
    """Bits the model needs for all `token_ids` but the first (the opening end-of-text).

    Documents longer than `window` are read in windows that overlap by a quarter, which serves as context only.
    """
    ids = torch.tensor(token_ids, device=next(model.parameters()).device)
    nats = torch.zeros((), dtype=torch.float64, device=ids.device)
    for start, end, first in windows(len(ids) - 1, window, window // 4):
        hidden = model.features(ids[None, start:end])[0, first - start :]
        targets = ids[first + 1 : end + 1]
        for chunk in range(0, len(targets), 1024):
            rows = slice(chunk, chunk + 1024)
            logits = model.lm_head(hidden[rows]).float()
            nats += F.cross_entropy(logits, targets[rows], reduction="sum")
    return float(nats) / math.log(2)


@dataclass(frozen=True)
class EncodedText:
    """A text as a model reads it."""

    token_ids: list[int]
    """The opening end-of-text first."""
    num_bytes: int
    """Of the text that they are, in UTF-8."""


def encode_text(tokenizer: Tokenizer, text: str, max_tokens: int | None = None) -> EncodedText:
    """A text, or the start of it that fits into `max_tokens`."""
    ids = tokenizer.encode(text, bos=True)
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = tokenizer.decode(ids[1:])
    return EncodedText(ids, len(text.encode()))


def bits_per_byte(
    model: PersimmonModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Total bits / total UTF-8 bytes over `texts`, each from its own start; `max_tokens` cuts long documents."""
    return encoded_bits_per_byte(
        model, (encode_text(tokenizer, text, max_tokens) for text in texts), window=window, progress=progress
    )


def encoded_bits_per_byte(
    model: PersimmonModel,
    texts: Iterable[EncodedText],
    *,
    window: int,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """`bits_per_byte` of texts that are encoded already."""
    bits, size = 0.0, 0
    for index, text in enumerate(texts):
        bits += document_bits(model, text.token_ids, window=window)
        size += text.num_bytes
        progress(index + 1)
    return bits / size
