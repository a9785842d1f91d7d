"""Who does the tasks of `data prepare`: this process, or datatrove's executors (local processes, Slurm, Ray).

Datatrove brings the scheduling (job arrays, dependencies, logs); what a task does is `data/stages.py` in either case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from persimmon.data.recipe import ExecutorRecipe
from persimmon.data.stages import Job, Stage, result_file, run_task
from persimmon.errors import ConfigError, DataError, UnavailableError
from persimmon.ray_cluster import ray_cluster


class StageStep:
    """A stage as a step of a datatrove pipeline of its own: one rank, one task."""

    def __init__(self, job: Job, stage: str) -> None:
        # The stage by name: it is unpickled in other processes, where its functions are looked up again.
        self.job, self.stage = job, stage

    def __call__(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do the task of this rank; no documents pass between steps."""
        from persimmon.data.prepare import ALL_STAGES

        run_task(self.job, next(stage for stage in ALL_STAGES if stage.name == self.stage), rank)
        return iter(())

    def __str__(self) -> str:
        return f"persimmon data prepare: {self.stage}"


def execute(job: Job, stages: Sequence[Stage], report: Callable[[str, bool], None]) -> bool:
    """Do all stages in order; False where they were handed to a queue that goes on without us.

    `report` gets the name of each stage and whether it is finished.
    """
    executor = job.recipe.executor
    planned = [(stage, stage.tasks(job)) for stage in stages if stage.tasks(job)]
    if executor.kind == "slurm":
        _submit(job, planned)
        return False
    with _ray(executor) if executor.kind == "ray" else contextlib.nullcontext():
        for stage, tasks in planned:
            report(stage.name, False)
            if executor.kind == "in_process":
                for number in range(tasks):
                    run_task(job, stage, number)
            else:
                _datatrove(executor, job, stage, tasks).run()
                _check_done(job, stage, tasks)
            report(stage.name, True)
    return True


def _ray(executor: ExecutorRecipe) -> contextlib.AbstractContextManager[None]:
    _executor_class("ray")  # says what is not installed
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray_cluster(ray, executor.workers * executor.options.get("cpus_per_task", 1))


def _check_done(job: Job, stage: Stage, tasks: int) -> None:
    """Raise DataError unless every task has its result: datatrove on Ray only logs what failed."""
    missing = [number for number in range(tasks) if not result_file(job, stage.name, number).is_file()]
    if missing:
        logs = _logs(job, stage) / "logs" / f"task_{missing[0]:05d}.log"
        raise DataError(f"stage {stage.name}: {len(missing)} of {tasks} tasks failed; why is at the end of {logs}")


def _logs(job: Job, stage: Stage) -> Path:
    return Path(job.recipe.output).resolve() / "logs" / f"{job.work.name}-{stage.name}"


def _submit(job: Job, planned: Sequence[tuple[Stage, int]]) -> None:
    """A job array per stage, each waiting for the one before; submitting the last submits all."""
    last = None
    for stage, tasks in planned:
        last = _datatrove(job.recipe.executor, job, stage, tasks, depends=last, job_name=f"persimmon-{stage.name}")
    assert last is not None
    last.run()


def _datatrove(executor: ExecutorRecipe, job: Job, stage: Stage, tasks: int, **extra: Any) -> Any:
    kind = _executor_class(executor.kind)
    arguments: dict[str, Any] = {
        "pipeline": [StageStep(job, stage.name)],
        "tasks": tasks,
        "workers": min(executor.workers, tasks),
        "logging_dir": str(_logs(job, stage)),
        "skip_completed": False,  # the tasks know themselves what is done
        **executor.options,
        **extra,
    }
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"executor.options: {str(error).split('.')[-1]}") from None


def _executor_class(kind: str) -> Any:
    try:
        if kind == "ray":
            import ray  # noqa: F401
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"executor {kind} needs the package {error.name}: pip install 'persimmon[data]'"
        ) from None
    return SlurmPipelineExecutor if kind == "slurm" else LocalPipelineExecutor
