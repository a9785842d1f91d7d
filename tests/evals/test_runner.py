"""The runner: fixed batches, a journal that survives any kill, and results that other tools read."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.oracles import ScriptedModel, guesses, knows, rambles
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.evals import results
from persimmon.evals.data import read_records, sample
from persimmon.evals.runner import Item, Settings, TaskRun, batches, prepare, prompts, run_task
from persimmon.evals.tasks import ALL, TASKS, find_tasks
from persimmon.evals.tasks.task import Generate, Question, Request, Response, Source


def items_of(data: Path, task_name: str = "arc_easy", style: str = "loglikelihood", **changes: object) -> list[Item]:
    task = TASKS[task_name]
    assert task.source is not None
    examples = read_records(task.examples, data) if task.examples else []
    return prepare(task, style, read_records(task.source, data), examples, Settings(**changes))  # type: ignore[arg-type]


def run(items: list[Item], model: ScriptedModel, journal: Path | None = None, **changes: object) -> TaskRun:
    chosen = Settings(**changes)  # type: ignore[arg-type]
    return run_task(TASKS["arc_easy"], "loglikelihood", items, model, chosen, journal=journal)


def numbers(task_run: TaskRun) -> str:
    return json.dumps([[a.item.id, a.responses, dict(a.outcome.metrics)] for a in task_run.answers])


class Killed(Exception):
    pass


def test_killed_anywhere_and_resumed_gives_the_same_numbers(data: Path, tmp_path: Path) -> None:
    items = items_of(data)
    whole = numbers(run(items, guesses(), batch_size=4))
    rng = random.Random(0)
    for trial in range(12):
        journal = tmp_path / f"{trial}.jsonl"
        for _ in range(100):
            model = guesses()
            answer, left = model._answer, rng.randrange(1, 60)

            def dying(request: Request, answer=answer) -> Response:  # type: ignore[no-untyped-def]
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return answer(request)

            model._answer = dying
            try:
                result = run(items, model, journal, batch_size=4)
                break
            except Killed:
                content = journal.read_bytes()
                journal.write_bytes(content[: len(content) - rng.randrange(0, 40)])  # a torn last line
        assert numbers(result) == whole
        again = guesses()
        assert numbers(run(items, again, journal, batch_size=4)) == whole and again.asked == 0


def test_killed_process_resumes(data: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment of a real process."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from evals.test_runner import guesses, items_of, run\n"
        "model = guesses(); answer = model._answer\n"
        "model._answer = lambda request: (time.sleep(0.004), answer(request))[1]\n"
        "run(items_of(Path(sys.argv[1])), model, Path(sys.argv[2]), batch_size=2)\n"
    )
    journal = tmp_path / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, str(data), str(journal)], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 4) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    items = items_of(data)
    before = journal.read_bytes().count(b"\n") - 1
    model = guesses()
    resumed = run(items, model, journal, batch_size=2)
    assert numbers(resumed) == numbers(run(items, guesses(), batch_size=2))
    assert model.asked == 4 * (len(items) - 2 * before)


def test_a_journal_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    run(items_of(data), guesses(), journal)
    with pytest.raises(InputError, match="another model"):
        run(items_of(data), rambles(), journal, batch_size=7)
    with pytest.raises(InputError, match="another model"):
        run(items_of(data, shots=2), guesses(), journal)


def test_batches_hold_every_item_once_and_common_beginnings_together(data: Path) -> None:
    items = items_of(data, "mmlu")
    plan = batches(items, Settings(batch_size=10))
    assert sorted(index for batch in plan for index in batch) == list(range(len(items)))
    assert all(len(batch) <= 10 for batch in plan)
    for batch in plan:
        assert len({items[index].group for index in batch}) == 1


@settings(max_examples=30)
@given(st.lists(st.text("ab ", max_size=40), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 200))
def test_batches_keep_their_limits(texts: list[str], size: int, characters: int) -> None:
    items = [Item(str(i), {}, Question((Generate(t, (), 1),), None), None) for i, t in enumerate(texts)]
    plan = batches(items, Settings(batch_size=size, batch_characters=characters))
    assert sorted(i for batch in plan for i in batch) == list(range(len(texts)))
    for batch in plan:
        assert len(batch) <= size
        assert len(batch) == 1 or sum(len(texts[i]) for i in batch) <= characters


def test_limit_draws_the_same_questions_evenly(data: Path) -> None:
    records = read_records(TASKS["mmlu"].source, data)  # type: ignore[arg-type]
    drawn = sample(records, 20)
    assert drawn == sample(records, 20) and len(drawn) == 20
    assert set(map(str, drawn)) < set(map(str, sample(records, 30)))
    assert len({record["subject"] for record in drawn}) == 2
    assert sample(records, 10_000) == records


def test_progress_and_names(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    task, items = TASKS["arc_easy"], items_of(data)
    run_task(task, "loglikelihood", items, guesses(), Settings(batch_size=16), progress=lambda *p: seen.append(p))
    assert seen[0] == (0, 40) and seen[-1] == (40, 40)
    assert [task.name for task in find_tasks("all")] == list(ALL)
    assert [task.name for task in find_tasks("long, mmlu")] == ["needle", "key_value", "mmlu"]
    with pytest.raises(InputError, match="'mmul'"):
        find_tasks("mmul")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"limit": 0}, "limit"), ({"shots": -1}, "shots"), ({"samples": 2}, "temperature"), ({"temperature": -1}, "temp")],
)
def test_bad_settings(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)  # type: ignore[arg-type]


def test_bad_data_is_named(tmp_path: Path) -> None:
    source = TASKS["arc_easy"].source
    assert isinstance(source, Source)
    with pytest.raises(NotFoundError, match=r"no arc_easy\.jsonl"):
        read_records(source, tmp_path)
    file = tmp_path / "arc_easy.jsonl"
    file.write_text('{"query": "x"}\n{"query": \n')
    with pytest.raises(DataError, match="line 2"):
        read_records(source, tmp_path)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match="object"):
        read_records(source, tmp_path)
    file.write_text("")
    with pytest.raises(DataError, match="no records"):
        read_records(source, tmp_path)
    file.write_text('{"query": "Question: x", "gold": 0}\n' * 9)
    with pytest.raises(DataError, match="record arc_easy/8: KeyError 'choices'"):
        items_of(tmp_path)
    (tmp_path / "arc_easy.jsonl").unlink()
    (tmp_path / "arc_easy.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="gz"):
        read_records(source, tmp_path)


def test_too_few_examples(data: Path) -> None:
    with pytest.raises(InputError, match="9 worked examples"):
        items_of(data, "mmlu", shots=9)
    with pytest.raises(InputError, match="no record is left"):
        items_of(data, shots=48)


def test_results_have_the_layout_of_lm_eval(data: Path, tmp_path: Path) -> None:
    items = items_of(data, "mmlu")
    done = run_task(TASKS["mmlu"], "loglikelihood", items, knows(items, "loglikelihood"), Settings())
    document = results.document([done], {"model": "knows"}, {"limit": None})
    path = results.write(tmp_path, [done], document)
    content, found = results.read(tmp_path)
    assert found == path
    entry = content["results"]["mmlu"]
    assert entry == {"alias": "MMLU", "sample_len": 60, "acc,none": 1.0, "acc_stderr,none": 0.0}
    assert content["persimmon"]["details"]["mmlu"] == {"intervals": {"acc": [1.0, 1.0]}, "unparsed": 0}
    rows = ["mmlu", "mmlu_more_sums", "mmlu_simple_sums"]
    assert content["n-shot"] == dict.fromkeys(rows, 5) and content["versions"] == dict.fromkeys(rows, 2)
    assert sorted(content["configs"]) == sorted(content["n-samples"]) == rows
    assert content["n-samples"]["mmlu"] == {"original": 60, "effective": 60}
    assert content["group_subtasks"]["mmlu"] == ["mmlu_more_sums", "mmlu_simple_sums"]
    assert content["results"]["mmlu_simple_sums"]["sample_len"] == 30
    (samples,) = tmp_path.glob("samples_mmlu_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 60
    assert lines[0]["arguments"]["gen_args_1"] == {"arg_0": prompts(items[0])[1], "arg_1": " B"}
    assert len(lines[0]["resps"]) == 4 and lines[0]["acc"] == 1.0
    assert lines[0]["filter"] == "none" and lines[0]["metrics"][0] == "acc"
    assert lines[0]["persimmon"]["parsed"]
    assert not list(tmp_path.glob(".*"))


def test_lm_eval_shows_our_results_and_has_our_hashes(data: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval.utils")
    pytest.importorskip("pytablewriter")
    runs = []
    for style in ("adept", "loglikelihood"):
        items = items_of(data, "mmlu", style=style)
        runs.append(run_task(TASKS["mmlu"], style, items, knows(items, style), Settings()))
    content = json.loads(json.dumps(results.document(runs, {"model": "knows"}, {"limit": None})))
    table = lm_eval.make_table(content)
    assert "MMLU" in table and "simple_sums" in table and "unparsed" not in table
    (line, *_) = results.sample_lines(runs[0])
    text = json.dumps(line["doc"], indent=2, default=lm_eval.handle_non_serializable, ensure_ascii=False)
    assert line["doc_hash"] == lm_eval.hash_string(text)


def test_unreadable_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="results_"):
        results.read(tmp_path)
    with pytest.raises(NotFoundError, match="nowhere"):
        results.read(tmp_path / "nowhere")
    (tmp_path / "results_1.json").write_text("{")
    with pytest.raises(InputError, match="results_1"):
        results.read(tmp_path)
    (tmp_path / "results_1.json").write_text("[]")
    with pytest.raises(InputError, match="'results'"):
        results.read(tmp_path)
