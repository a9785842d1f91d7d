"""Offline batches: a file of prompts to a file of answers, resumable, nothing answered twice.

Input and output are JSON Lines. A line of the input is `{"prompt": ...}` or `{"messages": [...]}`, with an optional
`id` (default: its line number) and optional sampling parameters of its own. The output gets one line per answer, whole
lines only and flushed as they come; after a kill, the same call skips the ids that are there, drops a half-written
last line, and goes on. Answers appear in the order in which they are finished; what each answer says does not depend
on the others, so the lines of an interrupted and an uninterrupted run are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon import chat
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.infer.engine import Engine, Request, Update
from persimmon.infer.params import SamplingParams
from persimmon.tokenizer import Tokenizer

_BASE_KEYS = {"id", "prompt", "messages"}


@dataclass(frozen=True)
class Job:
    """One line of the input."""

    id: str
    request: Request


@dataclass
class Tally:
    """What a run did."""

    answered: int = 0
    skipped: int = 0
    failed: int = 0


class _Answer:
    """The updates of one request, put together."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []

    def add(self, update: Update) -> None:
        """Take an update."""
        if update.piece is not None:
            self.texts.append(update.piece.text)
            self.token_ids += update.piece.token_ids

    def line(self, job_id: str, last: Update) -> dict[str, Any]:
        """The line of the output."""
        if last.failure is not None:
            return {"id": job_id, "error": last.failure.message}
        assert last.usage is not None, "an answer ends with its counts"
        usage = {"prompt_tokens": last.usage.prompt_tokens, "completion_tokens": last.usage.completion_tokens}
        return {"id": job_id, "text": "".join(self.texts), "finish_reason": last.finish_reason, "usage": usage}


def answer_file(
    engine: Engine,
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    sampling: Mapping[str, Any],
    *,
    ahead: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Answer every line of `source` that `target` does not answer yet; `sampling` are the defaults.

    At most `ahead` requests are handed to the engine at once. progress: called with (lines done, lines in all).
    Raises DataError for a line that cannot be read, before anything is run.
    """
    jobs = list(read_jobs(source, tokenizer, sampling))
    done = finished_ids(target)
    waiting = [job for job in jobs if job.id not in done]
    tally = Tally(skipped=len(jobs) - len(waiting))
    answers: dict[str, _Answer] = {}
    waiting.reverse()
    with target.open("a", encoding="utf-8") as output:
        while waiting or engine.busy:
            while waiting and len(answers) < ahead:
                job = waiting.pop()
                answers[job.id] = _Answer()
                _submit(engine, job, answers, output, tally)
            for update in engine.step() if engine.busy else ():
                answers[update.request_id].add(update)
                if update.finish_reason is not None or update.failure is not None:
                    _write(output, answers.pop(update.request_id).line(update.request_id, update), tally)
                    if progress is not None:
                        progress(tally.skipped + tally.answered + tally.failed, len(jobs))
    return tally


def _submit(engine: Engine, job: Job, answers: dict[str, _Answer], output: Any, tally: Tally) -> None:
    """Hand a job to the engine; one that it refuses is answered with the error."""
    try:
        engine.submit(job.request)
    except InputError as error:
        del answers[job.id]
        _write(output, {"id": job.id, "error": str(error)}, tally)


def _write(output: Any, line: Mapping[str, Any], tally: Tally) -> None:
    """One whole line, on the disk before the next is begun."""
    output.write(json.dumps(line, ensure_ascii=False) + "\n")
    output.flush()
    os.fsync(output.fileno())
    if "error" in line:
        tally.failed += 1
    else:
        tally.answered += 1


def read_jobs(source: Path, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> Iterator[Job]:
    """The lines of the input, checked; the seed of a line without one follows from the default seed and its place."""
    if not source.is_file():
        raise NotFoundError(f"no file {source}")
    seen: set[str] = set()
    with source.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                job = _job(number, json.loads(text), tokenizer, sampling)
            except (ValueError, InputError) as error:
                raise DataError(f"{source}, line {number}: {error}") from None
            if job.id in seen:
                raise DataError(f"{source}, line {number}: the id {job.id!r} appears twice")
            seen.add(job.id)
            yield job


def _job(number: int, line: Any, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> Job:
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise InputError("expected an object with either prompt or messages")
    own = {name: value for name, value in line.items() if name not in _BASE_KEYS}
    if isinstance(own.get("logit_bias"), dict):  # JSON has no integer keys
        own["logit_bias"] = {int(token_id): bias for token_id, bias in own["logit_bias"].items()}
    settings = {**sampling, **own}
    if settings.get("seed") is None:
        settings["seed"] = number
    elif "seed" not in own:
        settings["seed"] += number
    params = SamplingParams.of(**settings)
    if params.logprobs is not None:
        raise InputError("logprobs are not part of a batch's answers")
    if params.context_overflow != "error":
        raise InputError(f"context_overflow {params.context_overflow!r} does not work in a batch, only 'error'")
    job_id = str(line.get("id", number))
    if "prompt" in line:
        if not isinstance(line["prompt"], str):
            raise InputError("prompt must be a text")
        ids = tokenizer.encode(line["prompt"], bos=True)
        return Job(job_id, Request(job_id, tuple(ids), params))
    params = params.replace(stop=(*params.stop, *chat.STOP_STRINGS))
    ids = chat.encode(tokenizer, line["messages"])
    return Job(job_id, Request(job_id, tuple(ids), params, skip_space=True))


def finished_ids(target: Path) -> set[str]:
    """The ids that the output answers; a half-written last line is cut off."""
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with target.open("r+b") as file:
            file.truncate(len(whole))
    ids = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            ids.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{target}, line {number}: not a line of answers") from None
    return ids
