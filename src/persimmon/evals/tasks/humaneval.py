"""HumanEval: write the body of a Python function; its tests decide (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persimmon.evals.statistics import pass_at_k
from persimmon.evals.tasks.task import Generate, Outcome, Question, Record, Response, Source, Style, Task

INSTRUCTION = (
    "You write Python code. Given the signature of a function and its docstring, complete the body of the function. "
    "Examples follow."
)

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
"""What begins the next top-level statement after the function."""

MAX_TOKENS = 512
METRICS = ("pass@1", "pass@10", "pass@100")


def _ask_adept(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    """The worked example is a problem of the set and therefore never scored."""
    solved = [example["prompt"] + example["canonical_solution"].rstrip("\n") + "\n\n\n" for example in examples]
    prompt = instruction + "\n" + "".join(solved) + record["prompt"].rstrip("\n")
    return Question((Generate(prompt, STOP, MAX_TOKENS),), record["entry_point"])


def _ask_plain(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    solved = [example["prompt"] + example["canonical_solution"].rstrip("\n") + "\n\n\n" for example in examples]
    return Question((Generate("".join(solved) + record["prompt"], STOP, MAX_TOKENS),), record["entry_point"])


def programs(record: Record, question: Question, responses: Sequence[Response]) -> list[str]:
    """One program per completion: the problem, the completion, its tests.

    What was generated goes on where the prompt ended, with or without the line end that the prompt may lack.
    """
    completions = responses[0]
    assert isinstance(completions, list)
    request = question.requests[0]
    assert isinstance(request, Generate)
    prompt = record["prompt"] if request.context.endswith("\n") else record["prompt"].rstrip("\n")
    tests = f"{record['test']}\n\ncheck({record['entry_point']})\n"
    return [f"{prompt}{completion}\n\n{tests}" for completion in completions]


def _judge(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
    """The last response holds the verdicts, one status per completion."""
    statuses = responses[-1]
    completions = responses[0]
    assert isinstance(statuses, list) and isinstance(completions, list)
    right = statuses.count("passed")
    metrics = {f"pass@{k}": pass_at_k(len(statuses), right, k) for k in (1, 10, 100) if k <= len(statuses)}
    wrote_code = any(completion.strip() for completion in completions)
    return Outcome(metrics, statuses if len(statuses) > 1 else statuses[0], parsed=wrote_code)


def _adapt(record: Record) -> dict[str, Any]:
    return {key: record[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution", "test")}


TASK = Task(
    name="humaneval",
    title="HumanEval",
    version=1,
    source=Source("human_eval", "openai/openai_humaneval", None, "test", _adapt),
    styles={
        "adept": Style(
            "generated body after one solved problem",
            1,
            METRICS,
            _ask_adept,
            _judge,
            INSTRUCTION,
            rotate_examples=True,
            programs=programs,
        ),
        "loglikelihood": Style(
            "generated body, no instruction",
            0,
            METRICS,
            _ask_plain,
            _judge,
            programs=programs,
        ),
    },
)
