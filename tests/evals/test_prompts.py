"""Every prompt byte for byte: golden files hold what the model sees, `<|>` marks where its answer begins.

Run with UPDATE_GOLDEN=1 to write them anew after a deliberate change (and raise the task's version).
"""

import os
from pathlib import Path

import pytest

from persimmon.evals.data import read_records
from persimmon.evals.runner import Settings, prepare, prompts
from persimmon.evals.tasks import ALL, TASKS
from persimmon.evals.tasks.task import Generate, Score

GOLDEN = Path(__file__).parent / "golden"
CASES = [(task, style) for task in (*ALL, "needle", "key_value") for style in TASKS[task].styles]


@pytest.mark.parametrize(("task_name", "style"), CASES)
def test_prompt_matches_its_golden_file(task_name: str, style: str, data: Path) -> None:
    task = TASKS[task_name]
    if task.generate is not None:
        records, examples = task.generate(lambda text: len(text) // 8, 1024), []
    else:
        assert task.source is not None
        records = read_records(task.source, data)
        examples = read_records(task.examples, data) if task.examples else []
    item = prepare(task, style, records, examples, Settings())[1]
    shown = []
    for prompt, request in zip(prompts(item), item.question.requests, strict=True):
        after = request.continuation if isinstance(request, Score) else ""
        shown.append(f"{prompt}<|>{after}\n")
        if isinstance(request, Generate):
            shown.append(f"stop {list(request.stop)} max_tokens {request.max_tokens}\n")
    text = f"{item.id} gold {item.question.gold}\n" + "".join(shown)
    path = GOLDEN / f"{task_name}-{style}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("task_name", [name for name in ALL if name != "humaneval"])
def test_adept_layout(task_name: str, data: Path) -> None:
    """Instruction, one worked example, one blank line, the question; no white space behind the last cue."""
    task = TASKS[task_name]
    assert task.source is not None
    examples = read_records(task.examples, data) if task.examples else []
    for item in prepare(task, "adept", read_records(task.source, data), examples, Settings())[:10]:
        (prompt,) = prompts(item)
        instruction, _, rest = prompt.partition("\n")
        assert instruction == task.styles["adept"].instruction
        assert rest.count("\n\n") == 1 and "\n\n\n" not in rest
        assert prompt == prompt.rstrip() and prompt.endswith(":")


def test_examples_are_never_scored_and_vary(data: Path) -> None:
    task = TASKS["arc_easy"]
    assert task.source is not None
    records = read_records(task.source, data)
    items = prepare(task, "adept", records, [], Settings())
    assert [item.id for item in items] == [record["id"] for record in records[8:]]
    assert len({prompts(item)[0].split("\n\n")[0] for item in items}) == 8


def test_mmlu_examples_are_of_the_same_subject(data: Path) -> None:
    task = TASKS["mmlu"]
    assert task.source is not None and task.examples is not None
    records, examples = read_records(task.source, data), read_records(task.examples, data)
    by_question = {example["question"]: example["subject"] for example in examples}
    for item in prepare(task, "loglikelihood", records, examples, Settings()):
        blocks = prompts(item)[0].split("\n\n")[1:-1]
        assert len(blocks) == 5
        assert {by_question[block.split("\n")[0]] for block in blocks} == {item.group}


def test_own_instruction_chat_format_and_shots(data: Path) -> None:
    task = TASKS["arc_easy"]
    assert task.source is not None
    settings = Settings(instructions={"arc_easy": "Pick a letter."}, chat=True, shots=3)
    item = prepare(task, "adept", read_records(task.source, data), [], settings)[0]
    (prompt,) = prompts(item)
    assert prompt.startswith("human: Pick a letter.\nQuestion: ") and prompt.endswith("Answer:\n\nadept:")
    assert prompt.count("Question:") == 4
    request = item.question.requests[0]
    assert isinstance(request, Generate) and "\n\nhuman:" in request.stop
