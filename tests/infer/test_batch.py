"""Offline batches: resumable to the byte, nothing answered twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persimmon.errors import DataError, NotFoundError
from persimmon.infer.batch import answer_file
from persimmon.infer.block_cache import PagedReference
from persimmon.infer.engine import Engine, Failure, Update
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(max_positions=128)
SAMPLING = {"max_tokens": 6, "temperature": 1.0, "logit_bias": {1: -100.0}}


class Killed(BaseException):
    """As a SIGKILL: nothing catches it."""


class Mortal(Engine):
    """Dies after so many steps."""

    steps = 1_000_000

    def step(self) -> list[Update]:
        self.steps -= 1
        if self.steps < 0:
            raise Killed
        return super().step()


def engine(steps: int = 1_000_000) -> Engine:
    made = Mortal(PagedReference(MODEL, 64, 16), TOKENIZER, max_running=4)
    made.steps = steps
    return made


def engine_of(steps: int) -> Callable[[], Engine]:
    return lambda: engine(steps)


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "nothing twice"
    return {line["id"]: line for line in lines}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"prompt": f"the story {letter}"} for letter in "abcdefgh"]
    lines.append({"id": "chat", "messages": [{"role": "user", "content": "light"}], "logit_bias": {"1": -9}})
    return write(tmp_path / "prompts.jsonl", lines)


def test_a_killed_batch_resumes_to_the_same_answers(prompts: Path, tmp_path: Path) -> None:
    answer_file(engine, TOKENIZER, prompts, tmp_path / "whole.jsonl", SAMPLING)
    target = tmp_path / "killed.jsonl"
    for steps in (3, 7, 9):
        with pytest.raises(Killed):
            answer_file(engine_of(steps), TOKENIZER, prompts, target, SAMPLING)
        with target.open("a") as file:
            file.write('{"id": "5", "te')  # a line that was being written
    last = answer_file(engine, TOKENIZER, prompts, target, SAMPLING)
    assert last.skipped > 0 and last.skipped + last.answered == 9
    assert answers(target) == answers(tmp_path / "whole.jsonl")
    again = answer_file(engine_of(0), TOKENIZER, prompts, target, SAMPLING)
    assert (again.answered, again.skipped) == (0, 9)


def test_seeds_differ_from_line_to_line_and_stay(tmp_path: Path) -> None:
    source = write(tmp_path / "same.jsonl", [{"prompt": "a"}] * 4 + [{"prompt": "a", "seed": 2, "id": "x"}])
    answer_file(engine, TOKENIZER, source, tmp_path / "out.jsonl", SAMPLING | {"max_tokens": 12})
    found = answers(tmp_path / "out.jsonl")
    assert len({found[str(n)]["text"] for n in range(1, 5)}) > 1
    assert found["x"]["text"] == found["2"]["text"]


def test_what_does_not_fit_is_an_answer_with_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x" * 500}, {"prompt": "a"}])
    tally = answer_file(engine, TOKENIZER, source, tmp_path / "out.jsonl", SAMPLING)
    assert (tally.answered, tally.failed) == (1, 1)
    assert "context" in answers(tmp_path / "out.jsonl")["1"]["error"]


class Failing(Engine):
    """Loses the requests of one prompt, as when a step fails."""

    def step(self) -> list[Update]:
        updates = super().step()
        failed = Failure("the engine failed", "engine")
        return [Update(u.request_id, failure=failed) if u.request_id == "2" else u for u in updates]


def test_failed_answers_are_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": letter} for letter in "abc"] + [{"prompt": "x" * 500}])
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_file(engine, TOKENIZER, source, whole, SAMPLING)
    failing = Failing(PagedReference(MODEL, 64, 16), TOKENIZER, max_running=1)
    tally = answer_file(lambda: failing, TOKENIZER, source, target, SAMPLING | {"max_tokens": 1})
    assert (tally.answered, tally.failed) == (2, 2) and answers(target)["2"]["error"] == "the engine failed"
    before = [line for line in target.read_bytes().splitlines() if b"error" not in line]
    tally = answer_file(engine, TOKENIZER, source, target, SAMPLING | {"max_tokens": 1})
    assert (tally.answered, tally.failed, tally.skipped) == (1, 1, 2), "what cannot be answered is refused again"
    assert target.read_bytes().splitlines()[:2] == before, "answers stay as they were"
    assert answers(target).keys() == answers(whole).keys() and "text" in answers(target)["2"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "whole.jsonl"}


def no_engine() -> Engine:
    raise AssertionError("nothing is loaded for wrong input, nor when all is answered")


def test_the_model_is_loaded_for_right_input_with_open_lines_only(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": 3}]), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="line 2"):
        answer_file(no_engine, TOKENIZER, source, target, SAMPLING)
    write(source, [{"prompt": "a"}])
    answer_file(engine, TOKENIZER, source, target, SAMPLING)
    assert answer_file(no_engine, TOKENIZER, source, target, SAMPLING).skipped == 1


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"in\.jsonl, line 2: not UTF-8 \(.* at byte 15\)"):
        answer_file(no_engine, TOKENIZER, source, tmp_path / "out.jsonl", SAMPLING)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ('{"messages": "abc"}', "line 2"),
        ('{"prompt": "x", "stop": 5}', "line 2"),
        ("[]", "either prompt or messages"),
        ('{"prompt": 3}', "must be a text"),
        ('{"prompt": "a", "max_new_tokens": 3}', "max_tokens"),
        ('{"prompt": "a", "id": 1}', "appears twice"),
        ('{"messages": []}', "empty"),
        ('{"prompt": "a", "logprobs": 2}', "logprobs"),
        ('{"prompt": "a", "context_overflow": "shift"}', "context_overflow"),
    ],
)
def test_wrong_lines_are_named_before_anything_runs(tmp_path: Path, line: str, words: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        answer_file(engine_of(0), TOKENIZER, source, tmp_path / "out.jsonl", SAMPLING)
    with pytest.raises(NotFoundError):
        answer_file(engine, TOKENIZER, tmp_path / "none.jsonl", tmp_path / "out.jsonl", SAMPLING)
    (tmp_path / "other.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="not a line of answers"):
        answer_file(engine, TOKENIZER, write(source, [{"prompt": "a"}]), tmp_path / "other.jsonl", SAMPLING)
