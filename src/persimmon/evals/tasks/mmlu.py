"""MMLU: 57 subjects, four choices (Hendrycks et al. 2020, arXiv 2009.03300)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persimmon.evals.tasks.choices import LETTERS, letter_style, likelihood_style
from persimmon.evals.tasks.task import Record, Source, Task

INSTRUCTION = (
    "You answer multiple-choice questions. Choose among A, B, C and D; exactly one of them is correct. "
    "Reply with the letter of the correct choice."
)


def _read(record: Record) -> tuple[str, Sequence[str], int]:
    return record["question"], record["choices"], record["answer"]


def _description(record: Record) -> str:
    subject = record["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _context(record: Record) -> str:
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, record["choices"], strict=False))
    return f"{record['question'].strip()}\n{choices}Answer:"


def _adapt(record: Record) -> dict[str, Any]:
    keys = ("question", "subject", "choices", "answer")
    return {key: record[key] for key in keys}


TASK = Task(
    name="mmlu",
    title="MMLU",
    version=2,
    source=Source("mmlu", "cais/mmlu", "all", "test", _adapt),
    examples=Source("mmlu_dev", "cais/mmlu", "all", "dev", _adapt),
    group="subject",
    chance=0.25,
    styles={
        "adept": letter_style(INSTRUCTION, _read),
        "loglikelihood": likelihood_style(
            "likelihood of the letter",
            5,
            _context,
            lambda record: LETTERS[: len(record["choices"])],
            lambda record: int(record["answer"]),
            _description,
            metrics=("acc",),
        ),
    },
)
