"""Token stores made from lists of documents, as `data prepare` would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from persimmon.data.tokens import TokenStore, TokenStoreWriter

END = 1


def write_stores(
    directory: Path, sources: Mapping[str, Sequence[Sequence[int]]], weights: Mapping[str, float] | None = None
) -> dict[str, TokenStore]:
    """Write each source's documents (ids without end-of-text) and open them again."""
    facts = {}
    for name, documents in sources.items():
        writer = TokenStoreWriter(directory, name, "<u2", END)
        for document in documents:
            writer.add(list(document), 2 * len(document))
        facts[name] = {**writer.finish(), "weight": (weights or {}).get(name, 1.0)}
    manifest = {"dtype": "<u2", "vocab_size": 65_536, "sources": facts}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return {name: TokenStore(directory, name) for name in sources}
