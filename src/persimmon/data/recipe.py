"""What a data recipe may say. Read from YAML by `persimmon.train.recipe`, where unknown keys are errors."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any

from persimmon.data.filters import FilterRecipe
from persimmon.errors import ConfigError

_RELEASE_MIX = {"text": 0.75, "code": 0.25}
"""Share of the training tokens, as in the release's data (Adept's announcement of Persimmon-8B, 2023)."""

EXECUTORS = ("in_process", "local", "slurm", "ray")


@dataclass(frozen=True)
class SourceRecipe:
    """Files of one source and its share of the training tokens."""

    files: tuple[str, ...]
    """Glob patterns below the root, or `hf://datasets/OWNER/NAME[@REVISION]/PATTERN`; `!` leaves matches out."""
    weight: float | None = None
    """Relative to the other sources; sources named text and code have 75 and 25 % without one."""
    field: str = "text"
    """Key or column that holds the text."""
    filters: FilterRecipe | None = None
    """In place of the recipe's filters."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("files must name at least one pattern")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True)
class VocabularyRecipe:
    """A vocabulary to train, or the `path` of one to use."""

    size: int = 8192
    """Pieces, with the 256 bytes and `|ENDOFTEXT|`."""
    characters: int = 12_000_000
    """Size of the sample it is trained on."""
    path: str | None = None


@dataclass(frozen=True)
class DeduplicationRecipe:
    """Which documents count as the same. Equal texts are always one."""

    minhash: bool = False
    """Similar texts too (data/duplicates.py)."""
    across: bool = False
    """Over all sources, the first named keeping the document, instead of within each source."""
    shingle: int = 5
    """Words per shingle."""
    bands: int = 14
    rows: int = 8
    """Hash functions per band: fewer find less similar texts."""

    def __post_init__(self) -> None:
        for name in ("shingle", "bands", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class DecontaminationRecipe:
    """Evaluation sets whose questions no training document may contain."""

    directory: str
    """Files in the schemas of docs/evaluation.md."""
    words: int = 13
    """A document with a run of this many words of a question is left out."""

    def __post_init__(self) -> None:
        if self.words < 3:
            raise ConfigError(f"words must be at least 3, got {self.words}")


@dataclass(frozen=True)
class ExecutorRecipe:
    """Where the work is done. The result is the same everywhere."""

    kind: str = "in_process"
    """in_process, or datatrove's local processes, slurm or ray."""
    workers: int = 1
    """Tasks at a time."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of datatrove's executor: partition, time, venv_path, ... for Slurm."""

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            raise ConfigError(f"kind must be one of {', '.join(EXECUTORS)}, got {self.kind!r}")
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.options and self.kind == "in_process":
            raise ConfigError("options are those of datatrove's executors; in_process has none")


@dataclass(frozen=True)
class DataRecipe:
    """What to read, what to leave out, how to tokenize it and where to put it."""

    root: str
    output: str
    sources: dict[str, SourceRecipe]
    vocabulary: VocabularyRecipe = field(default_factory=VocabularyRecipe)
    held_out: float = 0.015
    """Share of the documents kept out of training, chosen by the hash of their text."""
    seed: int = 0
    filters: FilterRecipe = field(default_factory=FilterRecipe)
    deduplicate: DeduplicationRecipe = field(default_factory=DeduplicationRecipe)
    decontaminate: DecontaminationRecipe | None = None
    on_error: str = "stop"
    """At a broken record or file: stop, or skip it and say so in the counts and in `dropped.SOURCE.jsonl.gz`."""
    on_empty: str = "skip"
    """The same for a document without text."""
    part_bytes: int = 256_000_000
    """Files of a source are worked on together up to this stored size; every part has shards of its own."""
    shard_tokens: int = 1_000_000_000
    """Largest shard."""
    executor: ExecutorRecipe = field(default_factory=ExecutorRecipe)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 0.5:
            raise ConfigError(f"held_out must be in [0, 0.5), got {self.held_out}")
        if not self.sources:
            raise ConfigError("a data recipe needs at least one source")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ConfigError(
                    f"source names become file names and hold letters, digits, _ and - only, got {name!r}"
                )
        for name in ("on_error", "on_empty"):
            if getattr(self, name) not in ("stop", "skip"):
                raise ConfigError(f"{name} must be stop or skip, got {getattr(self, name)!r}")
        for name in ("part_bytes", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.weights

    @property
    def weights(self) -> dict[str, float]:
        """Share of the training tokens of each source as the recipe gives it (they need not add up to 1)."""
        given = {name: source.weight for name, source in self.sources.items() if source.weight is not None}
        if len(given) == len(self.sources):
            return given
        if not given and len(self.sources) == 1:
            return dict.fromkeys(self.sources, 1.0)
        if not given and set(self.sources) == set(_RELEASE_MIX):
            return {name: _RELEASE_MIX[name] for name in self.sources}
        missing = ", ".join(sorted(set(self.sources) - set(given)))
        raise ConfigError(f"sources without a weight: {missing}")


def is_held_out(text: str, share: float) -> bool:
    """Decides by the text alone, so that the same document is held out in every recipe."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64
