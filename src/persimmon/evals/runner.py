"""Runs tasks: the same questions in the same batches every time, journaled, so that a killed run goes on where it was.

Batches are a fixed function of the questions. A batch is journaled in one line once all of it is judged, and a line
that a kill cut off is dropped with its batch. What a resumed run computes is therefore bit for bit what it would have
computed without the interruption, and nothing is scored twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from persimmon import chat
from persimmon.errors import DataError, InputError
from persimmon.evals.data import sample
from persimmon.evals.journal import Journal
from persimmon.evals.language_model import LanguageModel
from persimmon.evals.tasks.task import (
    Generate,
    Outcome,
    Question,
    Record,
    Request,
    Response,
    RunProgram,
    Style,
    Task,
)

POOL = 8
"""Records kept for worked examples, and so not scored, where a set has no examples of its own."""


@dataclass(frozen=True)
class Settings:
    """How to run, the same for all tasks of a run."""

    shots: int | None = None
    """Worked examples; None takes each style's own number."""

    limit: int | None = None
    """Most questions per task, drawn evenly and always the same ones."""

    batch_size: int = 64
    """Most questions between two lines of the journal."""

    batch_characters: int = 131_072
    """Most characters of prompts in a batch, unless one question alone has more."""

    chat: bool = False
    """Wrap the prompts of generated answers in the chat format."""

    samples: int = 1
    """Completions per problem of tasks that run code."""

    temperature: float = 0.0
    """Of those completions."""

    instructions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Instruction lines by task name, instead of the task's own."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "samples", "batch_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.shots is not None and self.shots < 0:
            raise InputError(f"shots must not be negative, got {self.shots}")
        if self.temperature < 0:
            raise InputError(f"temperature must not be negative, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"{self.samples} samples at temperature 0 would be equal: give a temperature")


@dataclass(frozen=True)
class Item:
    """A question of a run."""

    id: str
    record: Record
    question: Question
    group: str | None


@dataclass(frozen=True)
class Answered:
    """A question with what the model said and the judgement. Responses are JSON."""

    item: Item
    responses: list[Any]
    outcome: Outcome


@dataclass(frozen=True)
class TaskRun:
    """All answers of one task in one style, in the order of the data."""

    task: Task
    style_name: str
    shots: int
    answers: list[Answered]

    @property
    def style(self) -> Style:
        """The way of asking."""
        return self.task.styles[self.style_name]

    @property
    def name(self) -> str:
        """Name in result files: the task's for the harness style, as lm-eval's, else with the style behind it."""
        return self.task.name if self.style_name == "loglikelihood" else f"{self.task.name}_{self.style_name}"


Progress = Callable[[int, int], None]
"""Called with (questions done, all questions)."""


def prepare(
    task: Task, style_name: str, records: Sequence[Record], examples: Sequence[Record], settings: Settings
) -> list[Item]:
    """The questions of a task. `examples` empty means that the first records serve as such and are not scored.

    Raises DataError when a record lacks a field, InputError when there are too few examples.
    """
    style = task.styles[style_name]
    shots = style.shots if settings.shots is None else settings.shots
    if not any(style.shots for style in task.styles.values()):
        shots = 0  # a task without worked examples
    elif not examples:
        size = max(POOL, shots)
        examples, records = records[:size], records[size:]
    if not records:
        raise InputError(f"{task.name}: no record is left to score beside the {len(examples)} worked examples")
    pools: dict[Any, list[Record]] = {}
    for example in examples:
        pools.setdefault(example.get(task.group or ""), []).append(example)
    instruction = settings.instructions.get(task.name, style.instruction)
    items = []
    for record in sample(list(records), settings.limit):
        try:
            chosen = _choose(pools.get(record.get(task.group or ""), []), shots, record, style.rotate_examples)
            question = _adjust(style.ask(record, chosen, instruction), style, settings)
            group = str(record[task.group]) if task.group else None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(f"{task.name}, record {record['id']}: {error}") from None
            raise DataError(f"{task.name}, record {record['id']}: {type(error).__name__} {error}") from error
        items.append(Item(str(record["id"]), record, question, group))
    return items


def _choose(pool: Sequence[Record], shots: int, record: Record, rotate: bool) -> list[Record]:
    if shots > len(pool):
        raise InputError(f"{shots} worked examples are wanted, {len(pool)} are there")
    start = zlib.crc32(str(record["id"]).encode()) % len(pool) if rotate and pool else 0
    return [pool[(start + number) % len(pool)] for number in range(shots)]


def _adjust(question: Question, style: Style, settings: Settings) -> Question:
    """Put the settings on generated answers."""

    def adjusted(request: Request) -> Request:
        if not isinstance(request, Generate):
            return request
        if settings.chat:
            context = chat.render([{"role": "user", "content": request.context}])
            request = dataclasses.replace(request, context=context, stop=(*request.stop, *chat.STOP_STRINGS))
        if style.programs is not None:
            request = dataclasses.replace(request, count=settings.samples, temperature=settings.temperature)
        return request

    return dataclasses.replace(question, requests=tuple(map(adjusted, question.requests)))


def prompts(item: Item) -> list[str]:
    """The text of each request, as the model sees it before the answer."""
    return [getattr(request, "context", getattr(request, "text", "")) for request in item.question.requests]


# -- batches -------------------------------------------------------------------------------------------


def batches(items: Sequence[Item], settings: Settings) -> list[list[int]]:
    """Indices of the items, batch by batch: prompts with a common beginning together, the rest by length.

    Longest first, so that the time left is overestimated at the start and memory runs out at once or never.
    """
    texts = [prompts(item)[0] for item in items]
    result: list[list[int]] = []
    used = 0
    for index in (index for family in _families(texts) for index in family):
        size = len(texts[index])
        if not result or len(result[-1]) >= settings.batch_size or used + size > settings.batch_characters:
            result.append([])
            used = 0
        result[-1].append(index)
        used += size
    return result


def _families(texts: Sequence[str]) -> list[list[int]]:
    """Group texts of which neighbours in sorted order share at least half; longest family first."""
    order = sorted(range(len(texts)), key=lambda index: texts[index])
    families: list[list[int]] = [order[:1]] if order else []
    for before, index in pairwise(order):
        half = min(len(texts[before]), len(texts[index])) // 2
        if half and texts[before][:half] == texts[index][:half]:
            families[-1].append(index)
        else:
            families.append([index])
    return sorted(families, key=lambda family: (-max(len(texts[index]) for index in family), family[0]))


# -- running -------------------------------------------------------------------------------------------


def run_task(
    task: Task,
    style_name: str,
    items: Sequence[Item],
    model: LanguageModel,
    settings: Settings,
    *,
    journal: Path | None = None,
    run_program: RunProgram | None = None,
    progress: Progress = lambda done, total: None,
) -> TaskRun:
    """Ask and judge all items, going on from `journal` where it holds batches of this very run.

    Raises InputError when the journal is of another run, or when the task runs code and `run_program` is missing.
    """
    style = task.styles[style_name]
    if style.programs is not None and run_program is None:
        raise InputError(f"{task.name} runs generated code and needs a sandbox")
    plan = batches(items, settings)
    fingerprint = _fingerprint(task, style_name, items, plan, model.identity)
    done: dict[int, Answered] = {}
    with Journal(journal, fingerprint) as book:
        for number, stored in book.entries.items():
            for index, entry in zip(plan[number], stored, strict=True):
                done[index] = Answered(items[index], entry["responses"], Outcome(**entry["outcome"]))
        progress(len(done), len(items))
        for number, batch in enumerate(plan):
            if number in book.entries:
                continue
            answers = _answer([items[index] for index in batch], style, model, run_program)
            entries = [{"responses": a.responses, "outcome": dataclasses.asdict(a.outcome)} for a in answers]
            book.add(number, entries)
            done.update(zip(batch, answers, strict=True))
            progress(len(done), len(items))
    shots = style.shots if settings.shots is None else settings.shots
    return TaskRun(task, style_name, shots, [done[index] for index in range(len(items))])


def _answer(
    items: Sequence[Item], style: Style, model: LanguageModel, run_program: RunProgram | None
) -> list[Answered]:
    """One batch: all requests in one call of the model, then judgement."""
    responses = iter(model.respond([request for item in items for request in item.question.requests]))
    said: list[list[Response]] = [[next(responses) for _ in item.question.requests] for item in items]
    if style.programs is not None:
        assert run_program is not None
        programs = [
            style.programs(item.record, item.question, answer) for item, answer in zip(items, said, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            verdicts = pool.map(run_program, [program for group in programs for program in group])
            for answer, group in zip(said, programs, strict=True):
                answer.append([next(verdicts).status for _ in group])
    return [
        Answered(item, [_as_json(part) for part in answer], style.judge(item.record, item.question, answer))
        for item, answer in zip(items, said, strict=True)
    ]


def _as_json(response: Response) -> Any:
    return response if isinstance(response, list) else dataclasses.asdict(response)


def _fingerprint(
    task: Task, style_name: str, items: Sequence[Item], plan: list[list[int]], identity: Mapping[str, Any]
) -> str:
    """A hash of everything that the numbers depend on."""
    parts = [task.name, task.version, style_name, dict(identity), plan]
    parts += [[item.id, dataclasses.asdict(item.question)] for item in items]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
