"""Bits per byte on held-out documents: the loss of a language model in units that no vocabulary can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    nats = 0.0
    for start, end, first in windows(len(ids) - 1, window, window // 4):
        hidden = model.features(ids[None, start:end])[0, first - start :]
        targets = ids[first + 1 : end + 1]
        for chunk in range(0, len(targets), 1024):
            rows = slice(chunk, chunk + 1024)
            logits = model.lm_head(hidden[rows]).float()
            nats += float(F.cross_entropy(logits, targets[rows], reduction="sum"))
    return nats / math.log(2)


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
    bits, size = 0.0, 0
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, bos=True)
        if max_tokens is not None and len(ids) > max_tokens:
            ids = ids[:max_tokens]
            text = tokenizer.decode(ids[1:])
        bits += document_bits(model, ids, window=window)
        size += len(text.encode())
        progress(index + 1)
    return bits / size
