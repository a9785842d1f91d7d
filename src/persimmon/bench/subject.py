"""The model that is measured: its decoder, and what the arithmetic needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persimmon.bench.traffic import Traffic, token_traffic
from persimmon.config import ModelConfig
from persimmon.infer.decoder import Decoder

_READ_BYTES = 8 << 20


@dataclass
class Subject:
    """A loaded model."""

    name: str
    directory: Path
    decoder: Decoder
    weight_format: str
    kv_dtype: str
    threads: int

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        return self.decoder.config

    @property
    def counts(self) -> Sequence[Mapping[str, float]] | None:
        """The engine's counters, or None where it has none."""
        counter = getattr(self.decoder, "layer_counts", None)
        return None if counter is None else counter()

    def reset_counts(self) -> None:
        """Start counting anew."""
        reset = getattr(self.decoder, "reset_counts", None)
        if reset is not None:
            reset()

    def traffic(self, attended: float, batch: int, head_rows: float | None) -> Traffic:
        """Bytes per token since the counters were reset."""
        return token_traffic(
            self.config, self.weight_format, self.kv_dtype,
            attended=attended, batch=batch, counts=self.counts, head_rows=head_rows,
        )  # fmt: skip

    def page_in(self) -> int:
        """Read mapped weight files: a peer may have pushed them out of the page cache. Returns bytes."""
        count = 0
        if getattr(self.decoder, "weights", None) == "resident":
            return count
        for file in sorted(self.directory.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while part := stream.read(_READ_BYTES):
                    count += len(part)
        return count

    def facts(self) -> dict[str, Any]:
        """The fields of a row that say what ran."""
        facts: dict[str, Any] = {
            "model": self.name,
            "engine": self.decoder.name,
            "format": self.weight_format,
            "kv_dtype": self.kv_dtype,
            "threads": self.threads,
        }
        known = {"instructions": getattr(self.decoder, "isa", None), "weights": getattr(self.decoder, "weights", None)}
        return facts | {name: value for name, value in known.items() if value}


def load_subject(name: str, options: Mapping[str, Any]) -> Subject:
    """Load a model with `persimmon.api.load_decoder`; it needs no tokenizer."""
    import torch

    from persimmon.api import load_decoder

    decoder, directory, choices = load_decoder(name, **options)
    dtype = next(line.split()[1] for line in choices if line.startswith("dtype "))
    form = getattr(decoder, "form", None)
    return Subject(
        name=Path(name).name,
        directory=directory,
        decoder=decoder,
        weight_format=dtype if form is None else form.name,
        kv_dtype=getattr(decoder, "kv_dtype", dtype),
        threads=getattr(decoder, "threads", torch.get_num_threads()),
    )


def random_ids(config: ModelConfig, count: int, seed: int) -> list[int]:
    """Token ids from the whole vocabulary: what they say does not matter for speed."""
    ids: list[int] = np.random.default_rng(seed).integers(config.vocab_size, size=count).tolist()
    return ids
