"""What `persimmon data inspect` says: lengths and shares of prepared data, trained tokens of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon import chat
from persimmon.data.conversations import Conversation
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.figures import load_pyplot, save_figure
from persimmon.tokenizer import Tokenizer

LONG = (1_024, 4_096, 16_384)
"""Tokens from which on a document counts as long: the row lengths of training."""

_PERCENTILES = (10, 50, 90, 99)


def inspect(directory: Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of prepared data, with statistics of the stores. Checks every checksum unless told not to.

    Raises NotFoundError and DataError for files that are missing or not as the manifest says.
    """
    manifest = read_manifest(directory)
    total = sum(facts["weight"] for facts in manifest["sources"].values())
    for name, facts in manifest["sources"].items():
        store = TokenStore(directory, name)
        if verify:
            store.verify()
        facts["share_of_training"] = facts["weight"] / total
        facts["bytes_per_token"] = facts["bytes"] / max(1, facts["tokens"])
        facts["lengths"] = length_statistics(store.lengths())
    return {**manifest, "verified": verify}


def length_statistics(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Of document lengths in tokens: percentiles, a histogram by powers of two, and what long documents make up."""
    if not len(lengths):
        return {"longest": 0, "percentiles": {}, "histogram": [], "long": []}
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    total = int(lengths.sum())
    histogram = [
        {"from": 1 << power, "documents": int((powers == power).sum()), "tokens": int(lengths[powers == power].sum())}
        for power in range(int(powers.min()), int(powers.max()) + 1)
    ]
    return {
        "longest": int(lengths.max()),
        "percentiles": {str(p): int(np.percentile(lengths, p)) for p in _PERCENTILES},
        "histogram": histogram,
        "long": [
            {
                "from": limit,
                "documents": int((lengths >= limit).sum()),
                "share_of_tokens": float(lengths[lengths >= limit].sum()) / total,
            }
            for limit in LONG
        ],
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Three panels as PNG (or what the suffix says): lengths, tokens by source, share of long documents."""
    pyplot = load_pyplot("data")
    sources = report["sources"]
    figure, (lengths, tokens, long) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, facts in sources.items():
        bars = facts["lengths"]["histogram"]
        share = [100 * bar["tokens"] / max(1, facts["tokens"]) for bar in bars]
        lengths.plot([bar["from"] for bar in bars], share, marker="o", markersize=3, label=name)
        marks = facts["lengths"]["long"]
        long.plot(range(len(marks)), [100 * mark["share_of_tokens"] for mark in marks], marker="o", label=name)
    lengths.set(xscale="log", xlabel="tokens of a document", ylabel="% of the source's tokens", title="lengths")
    lengths.set_xscale("log", base=2)
    long.set_xticks(range(len(LONG)), [f"≥ {limit:,}" for limit in LONG])
    long.set(ylim=(0, 100), xlabel="tokens of a document", ylabel="% of the source's tokens", title="long documents")
    names, places = list(sources), np.arange(len(sources))
    total = sum(facts["tokens"] for facts in sources.values())
    there = [100 * facts["tokens"] / max(1, total) for facts in sources.values()]
    tokens.bar(places - 0.2, there, 0.4, label="tokens there are")
    tokens.bar(places + 0.2, [100 * f["share_of_training"] for f in sources.values()], 0.4, label="tokens of training")
    tokens.set_xticks(places, names)
    tokens.set(ylabel="%", title=f"{total:,} tokens")
    for axes in (lengths, tokens, long):
        axes.legend(frameon=False)
    save_figure(figure, path, dpi=120)
    pyplot.close(figure)


@dataclass(frozen=True)
class Piece:
    """A run of tokens of a conversation that are all trained, or all not."""

    text: str
    tokens: int
    trained: bool


def trained_pieces(tokenizer: Tokenizer, conversation: Conversation) -> Iterator[Piece]:
    """The conversation as training sees it: answers and the end-of-text behind them carry loss, nothing else does."""
    ids, mask = chat.encode_for_training(tokenizer, conversation.messages)
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            raw = b"".join(_bytes(tokenizer, token_id) for token_id in ids[start:end])
            yield Piece(raw.decode(errors="replace"), end - start, bool(mask[start]))
            start = end


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a piece spells; control pieces by their name."""
    return tokenizer.piece(token_id).encode() if token_id in tokenizer.special_ids else tokenizer.piece_bytes(token_id)
