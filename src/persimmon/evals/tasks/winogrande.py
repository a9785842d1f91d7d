"""Winogrande: which of two names or things fits the blank (Sakaguchi et al. 2019, arXiv 1907.10641)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from persimmon.evals.tasks.choices import adept_prompt, judge_likelihood
from persimmon.evals.tasks.task import Generate, Outcome, Question, Record, Response, Score, Source, Style, Task

INSTRUCTION = (
    "You answer fill-in-the-blank questions. Each has a sentence with a blank and two options for filling it. "
    "Reply with 1 or 2."
)

_DIGIT = re.compile(r"[\s(\"'*]*(?:(?:the\s+)?(?:answer|option)(?:\s+is)?[\s:]*)?([12])(?![\d.]*\d)", re.IGNORECASE)


def sentence_and_options(record: Record) -> tuple[str, list[str]]:
    """The sentence with its blank `_`, and the two options, from a record in partial-evaluation form.

    There the two contexts differ at their end only, where the option stands; words the options share at their
    beginning count as sentence.
    """
    contexts = record["context_options"]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*contexts, strict=False)))
    before = contexts[0][: contexts[0].rfind(" ", 0, shared) + 1]
    rest = record["continuation"]
    gap = " " if rest[:1].isalnum() else ""
    return f"{before}_{gap}{rest}", [context[len(before) :].strip() for context in contexts]


def _shown(record: Record, solved: bool) -> str:
    """The sentence keeps its own full stop, so that two stand in a row, as in the release's prompts."""
    sentence, (first, second) = sentence_and_options(record)
    text = f"Q: {sentence}. 1 = {first} and 2 = {second}. Answer:"
    return f"{text}\n{record['gold'] + 1}" if solved else text


def parse_digit(text: str) -> int | None:
    """Index of the option that `text` answers with, or None."""
    found = _DIGIT.match(text)
    return int(found[1]) - 1 if found else None


def _ask_adept(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    worked = [_shown(example, solved=True) for example in examples]
    prompt = adept_prompt(instruction, worked, _shown(record, solved=False))
    return Question((Generate(prompt, ("\n\n", "\nQ:"), 6),), record["gold"])


def _judge_adept(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
    texts = responses[0]
    assert isinstance(texts, list)
    answer = parse_digit(texts[0])
    return Outcome({"acc": float(answer == question.gold)}, answer, parsed=answer is not None)


def _ask_partial(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    """Partial evaluation: the same rest of the sentence after each option (Trinh and Le 2018, arXiv 1806.02847)."""
    solved = [f"{shot['context_options'][shot['gold']]} {shot['continuation']}\n\n" for shot in examples]
    requests = tuple(
        Score("".join(solved) + context, f" {record['continuation']}") for context in record["context_options"]
    )
    return Question(requests, record["gold"])


def _adapt(record: Record) -> dict[str, Any]:
    before, _, after = record["sentence"].partition("_")
    options = [record["option1"], record["option2"]]
    return {
        "context_options": [before + option for option in options],
        "continuation": after.strip(),
        "gold": int(record["answer"]) - 1,
    }


TASK = Task(
    name="winogrande",
    title="Winogrande",
    version=1,
    source=Source("winogrande", "allenai/winogrande", "winogrande_xl", "validation", _adapt),
    chance=0.5,
    styles={
        "adept": Style("generated digit", 1, ("acc",), _ask_adept, _judge_adept, INSTRUCTION, rotate_examples=True),
        "loglikelihood": Style(
            "likelihood of the rest of the sentence",
            0,
            ("acc",),
            _ask_partial,
            judge_likelihood(lambda record: [record["continuation"]] * 2),
        ),
    },
)
