"""ARC Easy and ARC Challenge: school science questions (Clark et al. 2018, arXiv 1803.05457)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persimmon.evals.tasks.choices import letter_style, likelihood_style
from persimmon.evals.tasks.task import Record, Source, Task

INSTRUCTION = "You answer multiple-choice questions. From the options given, choose A, B, C or D. Examples follow."


def _read(record: Record) -> tuple[str, Sequence[str], int]:
    return record["query"].removeprefix("Question: "), record["choices"], record["gold"]


def _adapt(record: Record) -> dict[str, Any]:
    choices = record["choices"]
    return {
        "query": f"Question: {record['question']}",
        "choices": list(choices["text"]),
        "gold": list(choices["label"]).index(record["answerKey"]),
    }


def _task(name: str, title: str, configuration: str) -> Task:
    return Task(
        name=name,
        title=title,
        version=2,
        source=Source(name, "allenai/ai2_arc", configuration, "test", _adapt),
        chance=0.25,
        styles={
            "adept": letter_style(INSTRUCTION, _read),
            "loglikelihood": likelihood_style(
                "likelihood of the choice's text",
                0,
                lambda record: f"{record['query']}\nAnswer:",
                lambda record: record["choices"],
                lambda record: int(record["gold"]),
            ),
        },
    )


EASY = _task("arc_easy", "ARC Easy", "ARC-Easy")
CHALLENGE = _task("arc_challenge", "ARC Challenge", "ARC-Challenge")
