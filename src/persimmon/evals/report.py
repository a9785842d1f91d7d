"""Markdown tables of a run and of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persimmon.evals import published
from persimmon.evals.compare import Run, Score, against_published, against_run, rows
from persimmon.evals.formats import Fidelity
from persimmon.evals.tasks import TASKS


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; columns of numbers are right-aligned."""
    columns = list(zip(*([head, *body]), strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1] in "+-.0123456789" for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + "-:"[right] for width, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(head), rule, *map(line, body)])


def format_score(score: Score) -> str:
    """`41.2 [39.8, 42.6]`."""
    digits = 3 if score.metric == "bits_per_byte" else 1
    text = f"{score.value:.{digits}f}"
    return text if score.low is None else f"{text} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def _remark(score: Score) -> str:
    parts = []
    if score.unparsed:
        parts.append(f"{score.unparsed} unparsed")
    if score.chance is not None and score.low is not None and score.high is not None:
        if score.low <= score.chance <= score.high:
            parts.append("at chance")
        elif score.high < score.chance:
            parts.append("below chance")
    return ", ".join(parts)


def run_table(run: Run) -> str:
    """The scores of one run."""
    body = []
    for task, style in rows([run]):
        score = run.find(task, style)
        assert score is not None
        body.append(
            [
                f"{TASKS[task].title}",
                style,
                str(score.shots if score.shots is not None else "?"),
                str(score.num_questions or "?"),
                score.metric,
                format_score(score),
                "" if score.chance is None else f"{score.chance:.0f}",
                _remark(score),
            ]
        )
    head = ["task", "style", "shots", "questions", "metric", "score [95 %]", "chance", "remark"]
    return table(head, body)


def group_table(content: Mapping[str, Any], name: str, metric: str) -> str:
    """The parts of one task (subjects, or lengths and depths)."""
    body = []
    for part in content.get("group_subtasks", {}).get(name, []):
        entry = content["results"][part]
        value = f"{100 * entry[f'{metric},none']:.1f}"
        body.append([entry["alias"], str(entry["sample_len"]), value])
    return table(["part", "questions", metric], body)


def run_report(run: Run) -> str:
    """A whole run in Markdown: what was run, the table, the parts of long-context tasks."""
    about = run.content.get("persimmon", {})
    facts = {**about.get("identity", {}), **{k: v for k, v in about.get("settings", {}).items() if v not in (None, {})}}
    text = f"# Evaluation of {run.label}\n\n{run_table(run)}\n\n"
    text += (
        "Scores are percentages but for bits per byte. Intervals are 95 % bootstrap intervals over questions. "
        "`adept` generates an answer and parses it, `loglikelihood` compares the likelihood of the choices; "
        "the two are different measurements.\n\n"
    )
    for name, about_task in about.get("tasks", {}).items():
        if TASKS[about_task["task"]].group == "place":
            text += f"## {name}\n\n{group_table(run.content, name, 'acc')}\n\n"
    text += positions_section([run])
    return text + "## How it was run\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n"


def fidelity_table(found: Sequence[Fidelity]) -> str:
    """Formats and margins against their reference."""
    head = ["variant", "bits/byte", "perplexity", "mean KL", "max KL", "same top token", "tokens"]
    body = [
        [
            one.name,
            f"{one.bits_per_byte:.4f}",
            f"{one.perplexity:.4g}",
            f"{one.kl:.2e}",
            f"{one.kl_max:.2e}",
            f"{one.top1_agreement:.2%}",
            f"{one.num_tokens}",
        ]
        for one in found
    ]
    return table(head, body)


def positions_section(runs: Sequence[Run]) -> str:
    """Nats per token by position, one column per run; empty when no run measured it."""
    measured = [run for run in runs if "perplexity" in run.content["results"]]
    if not measured:
        return ""
    entries = [run.content["results"]["perplexity"] for run in measured]
    names = [key.removesuffix(",none") for key in entries[0] if key.startswith("nats") and "_" not in key]
    body = []
    for name in names:
        values = [entry.get(f"{name},none") for entry in entries]
        body.append([name.removeprefix("nats"), *("-" if value is None else f"{value:.4f}" for value in values)])
    return "## Nats per token by position\n\n" + table(["positions", *(run.label for run in measured)], body) + "\n\n"


def scores_table(runs: Sequence[Run]) -> str:
    """Several runs side by side, without the published numbers."""
    body = []
    for task, style in rows(runs):
        ours = [run.find(task, style) for run in runs]
        body.append([TASKS[task].title, style, *("-" if score is None else _with_shots(score) for score in ours)])
    return table(["task", "style", *(run.label for run in runs)], body)


def comparison(runs: Sequence[Run]) -> str:
    """Runs and published numbers side by side, the differences, and where each published number is from."""
    models = published.MODELS
    head = ["task", "style", *(run.label for run in runs), *(f"{m.name} ({m.shots}-shot)" for m in models.values())]
    body = []
    for task, style in rows(runs, with_release=True):
        ours = [run.find(task, style) for run in runs]
        theirs = [published.find(task, model, style) for model in models]
        cells = ["-" if score is None else _with_shots(score) for score in ours]
        cells += ["-" if number is None else _mark(number) for number in theirs]
        body.append([TASKS[task].title, style, *cells])
    text = "# Comparison\n\n" + table(head, body) + "\n\n"
    text += "Ours with shots and 95 % bootstrap interval. Published: ✓ verified, ? not verified, ?? low confidence.\n\n"
    text += _differences(runs) + positions_section(runs)
    return text + _sources()


def _with_shots(score: Score) -> str:
    shots = "" if score.shots is None else f", {score.shots}-shot"
    return format_score(score) + shots + (f", {score.unparsed} unparsed" if score.unparsed else "")


def _mark(number: published.Published) -> str:
    return f"{number.percent:.1f} " + ("✓" if number.verified else "??" if number.note else "?")


def _differences(runs: Sequence[Run]) -> str:
    return _between_runs(runs) + _from_published(runs)


def _between_runs(runs: Sequence[Run]) -> str:
    body = []
    for task, style in rows(runs):
        for run in runs[1:]:
            if (d := against_run(run, runs[0], task, style)) is not None:
                interval = f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
                body.append([TASKS[task].title, style, run.label, interval, f"{d.p_value:.3f}", f"{d.num_questions}"])
    if not body:
        return ""
    head = ["task", "style", "run", f"minus {runs[0].label} [95 %]", "p", "questions"]
    return "## Differences between runs, on the same questions\n\n" + table(head, body) + "\n\n"


def _from_published(runs: Sequence[Run]) -> str:
    body = []
    for task, style in rows(runs):
        for score in filter(None, (run.find(task, style) for run in runs)):
            gaps = [against_published(score, model) for model in published.MODELS]
            if any(gaps):
                cells = ["-" if gap is None else f"{gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}]" for gap in gaps]
                body.append([TASKS[task].title, score.run, *cells])
    if not body:
        return ""
    names = [f"minus {model.name}" for model in published.MODELS.values()]
    text = "## Differences from the published numbers\n\n" + table(["task", "run", *names], body)
    return text + "\n\nThe intervals hold the uncertainty of our score only; the published ones came without.\n\n"


def _sources() -> str:
    lines = ["## Sources of the published numbers", ""]
    for model, about in published.MODELS.items():
        for number in published.PUBLISHED:
            if number.model == model and (number.verified or number.style != "adept"):
                lines.append(
                    f"- {about.name}, {TASKS[number.task].title} {number.percent:.1f}: {number.style} style, "
                    f"{number.shots}-shot, verified, {number.source}" + (f" ({number.note})" if number.note else "")
                )
    lines.append(f"- all others: adept style, shots as in the table's head, not verified, {published.RELEASE}")
    return "\n".join(lines) + "\n"
