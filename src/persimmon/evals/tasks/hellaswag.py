"""HellaSwag: choose how a description goes on (Zellers et al. 2019, arXiv 1905.07830). Not in the release's table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from persimmon.evals.tasks.choices import letter_style, likelihood_style
from persimmon.evals.tasks.task import Record, Source, Task

INSTRUCTION = (
    "You choose how a text goes on. Of the continuations A, B, C and D exactly one is right. Reply with its letter."
)


def _read(record: Record) -> tuple[str, Sequence[str], int]:
    return f"{record['context']} ...", record["endings"], record["label"]


def _clean(text: str) -> str:
    """WikiHow's bracketed marks are an artefact of how the set was collected.

    As lm-eval 0.4 has it: two spaces become one, once, so that of three two are left.
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _adapt(record: Record) -> dict[str, Any]:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [_clean(ending) for ending in record["endings"]]
    return {"context": _clean(context), "endings": endings, "label": int(record["label"])}


TASK = Task(
    name="hellaswag",
    title="HellaSwag",
    version=2,
    source=Source("hellaswag", "Rowan/hellaswag", None, "validation", _adapt),
    chance=0.25,
    styles={
        "adept": letter_style(INSTRUCTION, _read, "generated letter (the release has no such prompt)"),
        "loglikelihood": likelihood_style(
            "likelihood of the ending",
            0,
            lambda record: record["context"],
            lambda record: record["endings"],
            lambda record: int(record["label"]),
        ),
    },
)
