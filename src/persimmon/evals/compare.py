"""Runs next to each other and next to the published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persimmon.evals import published, results
from persimmon.evals.statistics import Difference, paired_difference, unpaired_interval
from persimmon.evals.tasks import TASKS

TABLE = ("mmlu", "winogrande", "arc_easy", "arc_challenge", "triviaqa", "hellaswag", "humaneval")
"""Rows in the release's order; other tasks follow."""


@dataclass(frozen=True)
class Score:
    """One cell of ours, in percent where the metric is a share."""

    run: str
    task: str
    style: str
    metric: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    shots: int | None
    num_questions: int | None
    unparsed: int | None
    chance: float | None


@dataclass(frozen=True)
class Run:
    """A results file and the scores in it."""

    label: str
    path: Path
    content: dict[str, Any]
    scores: tuple[Score, ...]

    def find(self, task: str, style: str) -> Score | None:
        """The main score of a task in a style."""
        return next((s for s in self.scores if (s.task, s.style) == (task, style)), None)


def load(path: Path, label: str | None = None) -> Run:
    """Read a run: a results file of ours or of lm-eval, or a directory with one."""
    content, file = results.read(path)
    label = label or str(content.get("model_name") or path.name).rsplit("/", 1)[-1]
    return Run(label, file, content, tuple(_scores(label, content)))


def _scores(label: str, content: dict[str, Any]) -> list[Score]:
    """The main metric of every task known here; groups and foreign tasks are left out."""
    own = content.get("persimmon", {}).get("tasks", {})
    found = []
    for name, entry in content["results"].items():
        about = own.get(name) or {"task": name, "style": "loglikelihood"}
        task = TASKS.get(about["task"])
        if task is None or about["style"] not in task.styles:
            continue
        style = task.styles[about["style"]]
        metric = next(
            (metric for metric in style.metrics if isinstance(entry.get(f"{metric},none"), int | float)), None
        )
        if metric is None:
            continue
        scale = 1.0 if metric == "bits_per_byte" else 100.0
        stderr = entry.get(f"{metric}_stderr,none")
        stderr = stderr if isinstance(stderr, int | float) else None
        details = results.details_of(content, name)
        low, high = details.get("intervals", {}).get(metric) or (None, None)
        number = entry.get("sample_len") or content.get("n-samples", {}).get(name, {}).get("effective")
        found.append(
            Score(
                label,
                task.name,
                about["style"],
                metric,
                scale * entry[f"{metric},none"],
                None if stderr is None else scale * stderr,
                None if low is None else scale * low,
                None if high is None else scale * high,
                content.get("n-shot", {}).get(name),
                number,
                details.get("unparsed"),
                100 * task.chance or None,
            )
        )
    return found


def rows(runs: Sequence[Run], *, with_release: bool = False) -> list[tuple[str, str]]:
    """(task, style) of every row, the release's tasks first; `with_release` adds what only the release has."""
    pairs = {(score.task, score.style) for run in runs for score in run.scores}
    if with_release:
        pairs |= {(number.task, number.style) for number in published.PUBLISHED if number.source != published.SGLANG}
    order = {task: place for place, task in enumerate((*TABLE, *TASKS))}
    return sorted(pairs, key=lambda pair: (order[pair[0]], pair[1]))


def against_run(first: Run, second: Run, task: str, style: str) -> Difference | None:
    """Paired difference first - second, in percent for shares, over the questions that both answered."""
    one, other = first.find(task, style), second.find(task, style)
    if one is None or other is None or one.metric != other.metric:
        return None
    name = task if style == "loglikelihood" else f"{task}_{style}"
    mine = results.read_scores(first.path, name, one.metric)
    theirs = results.read_scores(second.path, name, other.metric)
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    scale = 1.0 if one.metric == "bits_per_byte" else 100.0
    return paired_difference(
        [scale * mine[key][0] for key in shared],
        [scale * theirs[key][0] for key in shared],
        [mine[key][1] for key in shared],
    )


def against_published(score: Score, model: str) -> tuple[float, float, float] | None:
    """(difference, low, high) of our score - the release's, same style; only our uncertainty is in the interval."""
    number = published.find(score.task, model, score.style)
    if number is None or score.stderr is None:
        return None
    low, high = unpaired_interval(score.value, score.stderr, number.percent)
    return score.value - number.percent, low, high


def to_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything of the comparison as one document."""
    differences = []
    for task, style in rows(runs):
        for run in runs[1:]:
            if (difference := against_run(run, runs[0], task, style)) is not None:
                entry = {"task": task, "style": style, "run": run.label, "against": runs[0].label}
                differences.append(entry | asdict(difference))
        for run in runs:
            score = run.find(task, style)
            for model in published.MODELS:
                if score is not None and (gap := against_published(score, model)) is not None:
                    entry = {"task": task, "style": style, "run": run.label, "against": model}
                    differences.append(entry | {"value": gap[0], "low": gap[1], "high": gap[2]})
    return {
        "runs": [
            {
                "label": run.label,
                "file": run.path.name,
                "identity": run.content.get("persimmon", {}).get("identity") or run.content.get("config", {}),
                "scores": [asdict(score) for score in run.scores],
            }
            for run in runs
        ],
        "published": [asdict(number) for number in published.PUBLISHED],
        "differences": differences,
    }
