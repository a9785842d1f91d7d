"""TriviaQA, closed book (Joshi et al. 2017, arXiv 1705.03551): a short answer, compared with the accepted ones."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from persimmon.evals.tasks.choices import adept_prompt
from persimmon.evals.tasks.task import Generate, Outcome, Question, Record, Response, Source, Style, Task

INSTRUCTION = (
    "You answer trivia questions. You are given a question and reply with an answer of 1-3 words. Examples follow."
)

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the form in which the data set compares answers."""
    words = text.lower().replace("_", " ").translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _question(record: Record) -> str:
    return str(record["context"]).removeprefix("Question: ").removesuffix("\nAnswer:")


def _accepted(record: Record) -> list[str]:
    return [str(record["answer"]), *map(str, record["aliases"])]


def _ask_adept(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    worked = [f"Q: {_question(example)}\nA: {example['answer']}" for example in examples]
    prompt = adept_prompt(instruction, worked, f"Q: {_question(record)}\nA:")
    return Question((Generate(prompt, ("\n",), 24),), _accepted(record))


def _ask_harness(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    solved = [f"{example['context']} {example['answer']}\n\n" for example in examples]
    return Question((Generate("".join([*solved, record["context"]]), ("\n", ".", ","), 24),), _accepted(record))


def _judge(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
    texts = responses[0]
    assert isinstance(texts, list)
    answer = re.sub(r"\s+", " ", texts[0]).strip()
    said = normalize(answer)
    right = bool(said) and said in {normalize(accepted) for accepted in question.gold}
    return Outcome({"exact_match": float(right)}, answer, parsed=bool(said))


def _adapt(record: Record) -> dict[str, Any]:
    answer = record["answer"]
    context = f"Question: {record['question']}\nAnswer:"
    return {"context": context, "answer": answer["value"], "aliases": list(answer["aliases"])}


TASK = Task(
    name="triviaqa",
    title="TriviaQA",
    version=1,
    source=Source("triviaqa", "mandarjoshi/trivia_qa", "rc.nocontext", "validation", _adapt),
    styles={
        "adept": Style(
            "generated short answer", 1, ("exact_match",), _ask_adept, _judge, INSTRUCTION, rotate_examples=True
        ),
        "loglikelihood": Style("generated answer, the harness's stops", 5, ("exact_match",), _ask_harness, _judge),
    },
)
