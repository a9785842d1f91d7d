"""Results as files: lm-eval's layout (`results_*.json`, `samples_*.jsonl`) with this package's own numbers added."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persimmon.atomic import write_text
from persimmon.errors import InputError, NotFoundError
from persimmon.evals.runner import Answered, TaskRun, prompts
from persimmon.evals.statistics import Estimate, estimate
from persimmon.evals.tasks.task import Generate, Measure


def summarize(answers: Sequence[Answered], metrics: Sequence[str]) -> dict[str, Estimate]:
    """Every metric that the answers have, over all of them."""
    summary = {}
    for name in metrics:
        outcomes = [answer.outcome for answer in answers if name in answer.outcome.metrics]
        if outcomes:
            weights = [outcome.weights.get(name, 1.0) for outcome in outcomes]
            if sum(weights) > 0:
                summary[name] = estimate([outcome.metrics[name] for outcome in outcomes], weights)
    return summary


def _entry(alias: str, answers: Sequence[Answered], metrics: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row of lm-eval's `results`, which must be numbers, and what it has no place for."""
    entry: dict[str, Any] = {"alias": alias, "sample_len": len(answers)}
    intervals = {}
    for name, value in summarize(answers, metrics).items():
        entry[f"{name},none"] = value.value
        entry[f"{name}_stderr,none"] = value.stderr
        intervals[name] = [value.low, value.high]
    return entry, {"intervals": intervals, "unparsed": sum(not answer.outcome.parsed for answer in answers)}


def document(runs: Sequence[TaskRun], identity: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results file of a run: lm-eval's keys, and `persimmon` with what its layout has no place for."""
    results: dict[str, Any] = {}
    details: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    owners: dict[str, TaskRun] = {}
    for run in runs:
        owners[run.name] = run
        results[run.name], details[run.name] = _entry(run.task.title, run.answers, run.style.metrics)
        for group in sorted({a.item.group for a in run.answers if a.item.group is not None}):
            name = f"{run.name}_{group}".replace(" ", "")
            inside = [answer for answer in run.answers if answer.item.group == group]
            owners[name] = run
            results[name], details[name] = _entry(group, inside, run.style.metrics)
            groups.setdefault(run.name, []).append(name)
    sizes = {name: results[name]["sample_len"] for name in owners}
    return {
        "results": results,
        "group_subtasks": groups,
        "configs": {name: _config(name, run) for name, run in owners.items()},
        "versions": {name: run.task.version for name, run in owners.items()},
        "n-shot": {name: run.shots for name, run in owners.items()},
        "higher_is_better": {
            name: dict.fromkeys(run.style.metrics, run.task.name != "perplexity") for name, run in owners.items()
        },
        "n-samples": {name: {"original": size, "effective": size} for name, size in sizes.items()},
        "config": {"model": "persimmon", "model_args": dict(identity), "limit": settings.get("limit")},
        "model_name": str(identity.get("model", "model")),
        "git_hash": None,
        "date": datetime.now(UTC).timestamp(),
        "persimmon": {
            "identity": dict(identity),
            "settings": dict(settings),
            "tasks": {run.name: {"task": run.task.name, "style": run.style_name} for run in runs},
            "details": details,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def details_of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """`intervals` by metric and `unparsed` of a row; empty for files of others."""
    found: Mapping[str, Any] = content.get("persimmon", {}).get("details", {}).get(name, {})
    return found


def _config(name: str, run: TaskRun) -> dict[str, Any]:
    source = run.task.source
    return {
        "task": name,
        "dataset_path": source.hub or source.file if source else "generated",
        "dataset_name": source.configuration if source else None,
        "test_split": source.split if source else None,
        "output_type": _output_type(run),
        "num_fewshot": run.shots,
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in run.style.metrics],
        "metadata": {"version": run.task.version, "style": run.style_name, "summary": run.style.summary},
    }


def _output_type(run: TaskRun) -> str:
    request = run.answers[0].item.question.requests[0]
    if isinstance(request, Measure):
        return "loglikelihood_rolling"
    return "generate_until" if isinstance(request, Generate) else "multiple_choice"


def sample_lines(run: TaskRun) -> list[dict[str, Any]]:
    """One line per question, in lm-eval's layout."""
    return [_sample(number, answer) for number, answer in enumerate(run.answers)]


def _sample(number: int, answer: Answered) -> dict[str, Any]:
    requests = answer.item.question.requests
    arguments = {
        f"gen_args_{index}": {"arg_0": prompt, "arg_1": getattr(request, "continuation", None) or _generation(request)}
        for index, (prompt, request) in enumerate(zip(prompts(answer.item), requests, strict=True))
    }
    return {
        "doc_id": number,
        "doc": dict(answer.item.record),
        "target": str(answer.item.question.gold),
        "arguments": arguments,
        "resps": [[_response(part)] for part in answer.responses],
        "filtered_resps": [_response(part) for part in answer.responses],
        "filter": "none",
        "metrics": list(answer.outcome.metrics),
        "doc_hash": _hash(json.dumps(dict(answer.item.record), indent=2, default=str, ensure_ascii=False)),
        "prompt_hash": _hash(prompts(answer.item)[0]),
        "target_hash": _hash(str(answer.item.question.gold)),
        **answer.outcome.metrics,
        "persimmon": {
            "answer": answer.outcome.answer,
            "parsed": answer.outcome.parsed,
            "weights": dict(answer.outcome.weights),
        },
    }


def _generation(request: Any) -> dict[str, Any]:
    if not isinstance(request, Generate):
        return {}
    return {"until": list(request.stop), "max_gen_toks": request.max_tokens, "temperature": request.temperature}


def _response(part: Any) -> Any:
    if isinstance(part, dict) and "greedy" in part:
        return [part["log_probability"], part["greedy"]]
    if isinstance(part, dict):
        return sum(part["log_probabilities"])
    return part[0] if len(part) == 1 else part


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path, runs: Sequence[TaskRun], results: Mapping[str, Any]) -> Path:
    """Write the results and the samples of all tasks; returns the path of the results."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromtimestamp(results["date"], UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    for run in runs:
        lines = (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in sample_lines(run))
        write_text(directory / f"samples_{run.name}_{stamp}.jsonl", "".join(lines))
    path = directory / f"results_{stamp}.json"
    write_text(path, json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    return path


def read(path: Path) -> tuple[dict[str, Any], Path]:
    """A results file, given itself or a directory (then its newest), and its path.

    Raises NotFoundError or InputError. Files of lm-eval are accepted as well.
    """
    if path.is_dir():
        found = sorted(path.rglob("results_*.json"), key=lambda file: file.name)
        if not found:
            raise NotFoundError(f"no results_*.json in {path}")
        path = found[-1]
    elif not path.is_file():
        raise NotFoundError(f"no results at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise InputError(f"{path} is not a results file: it has no 'results'")
    return content, path


def read_scores(results: Path, task: str, metric: str) -> dict[str, tuple[float, float]]:
    """Score and weight of every question of one task, by its hash, from the samples file beside `results`.

    Empty when there is none.
    """
    stamp = results.stem.removeprefix("results_")
    path = results.with_name(f"samples_{task}_{stamp}.jsonl")
    if not path.is_file():
        return {}
    scores = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        value = entry.get(metric)
        if isinstance(value, int | float) and not math.isnan(value):
            weight = entry.get("persimmon", {}).get("weights", {}).get(metric, 1.0)
            scores[f"{entry['doc_hash']}"] = float(value), float(weight)
    return scores
