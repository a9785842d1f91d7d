"""lm-eval's `local-completions` and `local-chat-completions` against the server: the scores of in-process runs."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "transformers", "tenacity"):
    pytest.importorskip(package)
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models")  # registers them: lm-eval does so itself only while it knows no model at all
os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.tasks import TaskManager  # noqa: E402

from persimmon.checkpoints.download import resolve  # noqa: E402
from persimmon.evals.lm_eval_plugin import PersimmonLM  # noqa: E402
from persimmon.serve.build import EngineSettings  # noqa: E402
from persimmon.tokenizer import Tokenizer  # noqa: E402
from served import Server, running  # noqa: E402

pytestmark = pytest.mark.slow
CONTEXT = 1_024
ENGINE: dict[str, Any] = {"engine": "reference", "dtype": "float32", "device": "cpu"}

DATA = os.environ.get("PERSIMMON_EVAL_DATA")
"""Directory of real sets as `persimmon eval --data` reads them: ARC Easy's first questions are asked too."""

REAL_QUESTIONS = 50

CHOICES = [
    ("The sun is", ["hot", "a small cat", "made of bread"], 0),
    ("Cows eat", ["the moon", "grass", "trains and buses"], 1),
    ("Ice is", ["a fire", "very loud", "cold"], 2),
    ("A week has", ["seven days", "two wheels", "no time at all"], 0),
]
QUESTIONS = [("What colour is the sky?", "blue"), ("Say hello.", "hello"), ("Name an animal.", "fox")]

CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
REPLY = """
task: reply
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}}
filter_list:
  - {{name: line, filter: [{{function: regex, regex_pattern: "(\\\\S[^\\\\n]*)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The shipped model in float32, on the engine that both sides share."""
    engine = EngineSettings("mini", {**ENGINE, "context": CONTEXT}, max_running=8, cache_tokens=8_192)
    with running(engine, context=CONTEXT, tokenizer=Tokenizer.load(resolve("mini")), name="mini") as found:
        yield found


def choices() -> list[dict[str, Any]]:
    """Made questions, and real ones where there are some."""
    rows: list[dict[str, Any]] = [{"query": q, "choices": c, "gold": g} for q, c, g in CHOICES]
    if DATA:
        with gzip.open(Path(DATA) / "arc_easy.jsonl.gz", "rt", encoding="utf-8") as lines:
            real = [json.loads(line) for line in itertools.islice(lines, REAL_QUESTIONS)]
        rows += [{"query": f"{r['query']}\nAnswer:", "choices": r["choices"], "gold": r["gold"]} for r in real]
    return rows


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    for name, template, rows in (
        ("choose", CHOOSE, choices()),
        ("reply", REPLY, [{"question": q, "answer": a} for q, a in QUESTIONS]),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(template.format(data=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(manager: TaskManager, tasks: list[str], model: Any, **options: Any) -> dict[str, Any]:
    """Metrics and answers of every task."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **options
    )
    metrics = {
        task: {k: v for k, v in result.items() if "," in k and "stderr" not in k}
        for task, result in found["results"].items()
    }
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return {"metrics": metrics, "answers": answers}


def test_completions_score_as_in_process(server: Server, manager: TaskManager) -> None:
    arguments = {
        "model": "mini", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote", "batch_size": 4,
        "num_concurrent": 2, "max_length": CONTEXT,
    }  # fmt: skip
    remote = scores(manager, ["choose", "reply"], "local-completions", model_args=arguments)
    local = scores(manager, ["choose", "reply"], PersimmonLM("mini", add_bos_token=False, context=CONTEXT, **ENGINE))
    assert remote["metrics"] == local["metrics"]
    assert remote["answers"]["reply"] == local["answers"]["reply"]
    for ours, theirs in zip(remote["answers"]["choose"], local["answers"]["choose"], strict=True):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    pairs = zip(
        itertools.chain(*remote["answers"]["choose"]), itertools.chain(*local["answers"]["choose"]), strict=True
    )
    gaps = [abs(ours[0] - theirs[0]) for ours, theirs in pairs]
    print(f"{len(gaps)} choices, largest difference {max(gaps):.2e}; {remote['metrics']['choose']}")


def test_chats_score_as_in_process(server: Server, manager: TaskManager) -> None:
    arguments = {
        "model": "mini", "base_url": f"{server.url}/v1/chat/completions", "num_concurrent": 2, "max_length": CONTEXT
    }  # fmt: skip
    remote = scores(manager, ["reply"], "local-chat-completions", model_args=arguments, apply_chat_template=True)
    local = scores(manager, ["reply"], PersimmonLM("mini", context=CONTEXT, **ENGINE), apply_chat_template=True)
    assert remote == local
