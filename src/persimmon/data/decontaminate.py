"""Overlap with evaluation sets: documents that share a run of 13 words with a question are named, and left out.

Thirteen words is the length GPT-3 used (Brown et al. 2020, appendix C). Words are lower case, without punctuation. A
field shorter than that cannot be recognised by it: `EvaluationIndex.too_short` counts such fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persimmon.data.documents import read_json_lines
from persimmon.data.ngrams import ngram_hashes, words_of
from persimmon.errors import DataError, NotFoundError

_FIELDS = {
    "mmlu": ("question", "choices"),
    "mmlu_dev": ("question", "choices"),
    "arc_easy": ("query", "choices"),
    "arc_challenge": ("query", "choices"),
    "winogrande": ("context_options", "continuation"),
    "hellaswag": ("context", "endings"),
    "triviaqa": ("context",),
    "human_eval": ("prompt", "canonical_solution"),
    "documents": ("text",),
}
"""Fields by file name, in the schemas of docs/evaluation.md; of other files every string counts."""


@dataclass(frozen=True)
class Overlap:
    """A shared run of words and the question that holds it."""

    words: str
    question: str


class EvaluationIndex:
    """All runs of `n` words of the evaluation sets in a directory."""

    def __init__(self, directory: Path, n: int) -> None:
        files = sorted(p for p in directory.glob("*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")))
        if not files:
            raise NotFoundError(f"no evaluation sets (*.jsonl, *.jsonl.gz) at {directory}")
        self.n, self.too_short = n, 0
        self.questions: list[str] = []
        hashes, owners = [], []
        for file in files:
            for origin, record in read_json_lines(file):
                for text in _texts(record, _FIELDS.get(file.name.split(".")[0])):
                    found = ngram_hashes(words_of(text), n)
                    self.too_short += not len(found)
                    hashes.append(found)
                    owners.append(np.full(len(found), len(self.questions), dtype=np.int64))
                self.questions.append(str(record.get("id", record.get("task_id", origin))))
        if not hashes:
            raise DataError(f"the evaluation sets at {directory} hold no text")
        self._hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self._owners = np.concatenate(owners)[first]

    def __len__(self) -> int:
        return len(self._hashes)

    def overlap(self, text: str) -> Overlap | None:
        """The first run of words that `text` shares with a question."""
        words = words_of(text)
        found = ngram_hashes(words, self.n)
        if not len(found) or not len(self._hashes):
            return None
        places = np.minimum(np.searchsorted(self._hashes, found), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[places] == found)
        if not len(hits):
            return None
        start = int(hits[0])
        return Overlap(" ".join(words[start : start + self.n]), self.questions[int(self._owners[places[start]])])


def _texts(record: dict[str, Any], fields: tuple[str, ...] | None) -> Iterator[str]:
    for field, value in record.items():
        if fields is None or field in fields:
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
