"""Models whose scores are known beforehand get them, in every task and style."""

from pathlib import Path

import pytest

from evals.oracles import ScriptedModel, guesses, knows, rambles
from persimmon.errors import UnavailableError
from persimmon.evals.data import read_records
from persimmon.evals.results import summarize
from persimmon.evals.runner import Item, Settings, TaskRun, prepare, run_task
from persimmon.evals.sandbox import Limits, Sandbox, open_sandbox
from persimmon.evals.tasks import ALL, TASKS
from persimmon.evals.tasks.humaneval import programs

PAIRS = [(task, style) for task in ALL for style in TASKS[task].styles]
LETTERED = [pair for pair in PAIRS if pair[0] not in ("triviaqa", "humaneval")]


def items_of(task_name: str, style: str, data: Path, settings: Settings = Settings()) -> list[Item]:  # noqa: B008
    task = TASKS[task_name]
    assert task.source is not None
    examples = read_records(task.examples, data) if task.examples else []
    return prepare(task, style, read_records(task.source, data), examples, settings)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return open_sandbox(limits=Limits(wall_seconds=60))
    except UnavailableError as error:
        pytest.skip(str(error))


def run(task: str, style: str, items: list[Item], model: ScriptedModel, box: Sandbox | None) -> TaskRun:
    return run_task(TASKS[task], style, items, model, Settings(), run_program=box.run if box else None)


@pytest.mark.parametrize(("task", "style"), PAIRS)
def test_a_model_that_knows_scores_everything(task: str, style: str, data: Path, box: Sandbox) -> None:
    items = items_of(task, style, data)
    result = run(task, style, items, knows(items, style), box)
    main = TASKS[task].styles[style].metrics[0]
    score = summarize(result.answers, [main])[main]
    assert (score.value, score.low, score.high) == (1.0, 1.0, 1.0)
    assert all(answer.outcome.parsed for answer in result.answers)


@pytest.mark.parametrize(("task", "style"), LETTERED)
def test_a_model_that_guesses_scores_chance(task: str, style: str, data: Path) -> None:
    items = items_of(task, style, data)
    score = summarize(run(task, style, items, guesses(), None).answers, ["acc"])["acc"]
    assert score.low <= TASKS[task].chance <= score.high
    assert 0.0 < score.stderr < 0.1


@pytest.mark.parametrize(("task", "style"), [pair for pair in PAIRS if pair[1] == "adept"])
def test_a_model_that_never_answers_scores_nothing_and_it_is_said(
    task: str, style: str, data: Path, box: Sandbox
) -> None:
    items = items_of(task, style, data)
    model = rambles("" if task in ("triviaqa", "humaneval") else "Well, that depends")
    result = run(task, style, items, model, box)
    main = TASKS[task].styles[style].metrics[0]
    assert summarize(result.answers, [main])[main].value == 0.0
    assert not any(answer.outcome.parsed for answer in result.answers)


MUTATIONS = {
    "wrong operator": lambda body: body.replace("x + ", "x - ").replace("total += ", "total -= "),
    "no return": lambda body: body.replace("return", "pass #"),
    "off by one": lambda body: body.replace("return x", "return 1 + x").replace("return total", "return total + 1"),
    "syntax error": lambda body: body.replace("return", "retrun"),
    "exit": lambda body: "    raise SystemExit\n",
    "hard exit": lambda body: "    import os; os._exit(0)\n",
    "endless": lambda body: "    raise RecursionError\n",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_solutions_fail(mutation: str, data: Path, box: Sandbox) -> None:
    for item in items_of("humaneval", "loglikelihood", data)[:3]:
        body = item.record["canonical_solution"]
        mutant = MUTATIONS[mutation](body)
        assert mutant != body or item.record["entry_point"] == "add_0"
        good, bad = programs(item.record, item.question, [[body, mutant]])
        assert box.run(good).passed
        assert not box.run(bad).passed


def test_samples_of_code_give_pass_at_k(data: Path, box: Sandbox) -> None:
    settings = Settings(samples=10, temperature=0.8)
    items = items_of("humaneval", "loglikelihood", data, settings)[:2]
    right = {item.question.requests[0]: item.record["canonical_solution"] for item in items}
    model = ScriptedModel(lambda request: [right[request]] * 3 + ["    return None\n"] * 7)
    result = run("humaneval", "loglikelihood", items, model, box)
    metrics = result.answers[0].outcome.metrics
    assert metrics["pass@1"] == pytest.approx(0.3) and metrics["pass@10"] == 1.0
    assert result.answers[0].outcome.answer.count("passed") == 3
