"""The tasks, by name."""

from __future__ import annotations

from persimmon.errors import InputError
from persimmon.evals.tasks import arc, hellaswag, humaneval, long_context, mmlu, perplexity, triviaqa, winogrande
from persimmon.evals.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        mmlu.TASK,
        winogrande.TASK,
        arc.EASY,
        arc.CHALLENGE,
        triviaqa.TASK,
        hellaswag.TASK,
        humaneval.TASK,
        long_context.NEEDLE,
        long_context.KEY_VALUE,
        perplexity.TASK,
    )
}

ALL = ("mmlu", "winogrande", "arc_easy", "arc_challenge", "triviaqa", "hellaswag", "humaneval")
"""What `--tasks all` runs: the release's table and HellaSwag."""

STYLES = ("adept", "loglikelihood")


def find_tasks(names: str) -> list[Task]:
    """The tasks of a comma-separated list; `all` stands for those of ALL, `long` for needle and key_value."""
    groups = {"all": ALL, "long": ("needle", "key_value")}
    chosen: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        chosen += [one for one in groups.get(name, (name,)) if one not in chosen]
    unknown = [name for name in chosen if name not in TASKS]
    if unknown or not chosen:
        raise InputError(
            f"unknown task {', '.join(map(repr, unknown)) or names!r}; known: {', '.join(TASKS)}, all, long"
        )
    return [TASKS[name] for name in chosen]
