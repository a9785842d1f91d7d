"""Offline batches: a file of prompts to a file of answers, resumable, nothing answered twice.

Input and output are JSON Lines. A line of the input is `{"prompt": ...}` or `{"messages": [...]}`, with an optional
`id` (default: its line number) and optional sampling parameters of its own. The output gets one line per answer, whole
lines only and flushed as they come. After a kill, the same call skips the ids that are there, takes out a half-written
last line and lines with an error, which are tried again, and goes on. Answers appear in the order in which they are
finished; what each answer says does not depend on the others, so the lines of an interrupted and an uninterrupted run
are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon import chat
from persimmon.atomic import write_bytes
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.infer.engine import Engine, Request, Update
from persimmon.infer.params import SamplingParams
from persimmon.tokenizer import Tokenizer

_BASE_KEYS = {"id", "prompt", "messages"}

AHEAD = 64
"""Jobs in the engine at once: more than run together, so that it never waits for the next."""


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
    total: int = 0
    """Lines of the input."""


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
    load: Callable[[], Engine],
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    sampling: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Answer every line of `source` that `target` does not answer yet; `sampling` are the defaults.

    load: gives the engine; called once all input has been read and found right, and only if something is open.
    progress: called with (lines done, lines in all). Raises DataError for a line that cannot be read.
    """
    jobs, tally = open_jobs(source, target, tokenizer, sampling)
    return write_answers(target, run_jobs(load(), jobs), tally, progress=progress) if jobs else tally


def open_jobs(source: Path, target: Path, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> tuple[list[Job], Tally]:
    """The lines that are still to be answered, and a tally of those that need not be. Raises as `answer_file`."""
    jobs = list(read_jobs(source, tokenizer, sampling))
    done = keep_answers(target)
    waiting = [job for job in jobs if job.id not in done]
    return waiting, Tally(skipped=len(jobs) - len(waiting), total=len(jobs))


def run_jobs(engine: Engine, jobs: Iterable[Job]) -> Iterator[dict[str, Any]]:
    """The lines of the answers, as they are finished; at most AHEAD jobs are in the engine at once."""
    waiting = iter(jobs)
    answers: dict[str, _Answer] = {}
    more = True
    while more or engine.busy:
        while more and len(answers) < AHEAD:
            job = next(waiting, None)
            if job is None:
                more = False
                break
            try:
                engine.submit(job.request)
            except InputError as error:  # refused: the error is the answer
                yield {"id": job.id, "error": str(error)}
            else:
                answers[job.id] = _Answer()
        for update in engine.step() if engine.busy else ():
            answers[update.request_id].add(update)
            if update.finish_reason is not None or update.failure is not None:
                yield answers.pop(update.request_id).line(update.request_id, update)


def write_answers(
    target: Path,
    lines: Iterable[Mapping[str, Any]],
    tally: Tally,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Append each line as it comes, whole and on the disk before the next is begun; the tally with what they were."""
    with target.open("a", encoding="utf-8") as output:
        for line in lines:
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            os.fsync(output.fileno())
            if "error" in line:
                tally.failed += 1
            else:
                tally.answered += 1
            if progress is not None:
                progress(tally.skipped + tally.answered + tally.failed, tally.total)
    return tally


def read_jobs(source: Path, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> Iterator[Job]:
    """The lines of the input, checked; the seed of a line without one follows from the default seed and its place."""
    if not source.is_file():
        raise NotFoundError(f"no file {source}")
    seen: set[str] = set()
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                job = _job(number, json.loads(line.decode()), tokenizer, sampling)
            except UnicodeDecodeError as error:
                raise DataError(f"{source}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
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


def keep_answers(target: Path) -> set[str]:
    """The ids that the output answers. A half-written last line and lines with an error are taken out of it."""
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    kept, ids = [], set()
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            answer = json.loads(line)
            if "error" not in answer:
                ids.add(str(answer["id"]))
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{target}, line {number}: not a line of answers") from None
    if sum(map(len, kept)) < len(content):
        write_bytes(target, b"".join(kept))
    return ids
