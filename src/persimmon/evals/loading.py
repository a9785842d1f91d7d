"""A model by name as a LanguageModel, with everything that its scores depend on written into its identity."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persimmon.evals.language_model import DecoderLanguageModel

_SAMPLED = 64  # stretches of each weight file that go into the fingerprint
_STRETCH = 4_096  # bytes


def load_language_model(
    model: str,
    *,
    bos: bool = True,
    lanes: int | None = None,
    cache_tokens: int = 65_536,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> DecoderLanguageModel:
    """Load a model; `options` are those of `persimmon.load`, the rest those of DecoderLanguageModel."""
    from persimmon.api import load
    from persimmon.checkpoints.download import resolve

    loaded = load(model, **(options or {}))
    chosen = {line.split(" ")[0]: line.split(" ")[1] for line in loaded.choices}
    identity: dict[str, Any] = {
        "model": Path(model).name if Path(model).exists() else model,
        "weights": weights_fingerprint(Path(resolve(model))),
        **{name: chosen[name] for name in ("device", "dtype") if name in chosen},
        "rotary_precision": loaded.config.rotary_precision,
        **{
            name: value if value != math.inf else "inf"  # JSON has no infinity
            for name, value in (options or {}).items()
            if name not in ("device", "engine", "dtype", "threads")
        },
        "context": loaded.context,
    }
    if identity.get("adapter"):
        identity["adapter"] = weights_fingerprint(Path(identity["adapter"]))
    return DecoderLanguageModel(
        loaded.decoder,
        loaded.tokenizer,
        context=loaded.context,
        bos=bos,
        lanes=lanes,
        cache_tokens=cache_tokens,
        seed=seed,
        identity=identity,
    )


def weights_fingerprint(directory: Path) -> str:
    """A short hash of the weight files: names, sizes, and stretches spread over each, so that 17 GB cost no time."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLED):
                file.seek(max(0, size - _STRETCH) * number // max(1, _SAMPLED - 1))
                digest.update(file.read(_STRETCH))
    return digest.hexdigest()[:16]
