"""Offline batches on several engines, on one machine or many, through Ray Data.

Ray Data spreads the open lines over actors that each hold an engine, and answers a lost actor's lines again on
another. Only this process writes the output, so the rules of `infer/batch.py` hold: after a kill the same call goes on
where it was, nothing is answered twice, and the answers are those of one engine, because every line has its seed.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persimmon.errors import InputError, UnavailableError
from persimmon.infer.batch import Job, Tally, open_jobs, run_jobs, write_answers
from persimmon.infer.engine import Engine
from persimmon.ray_cluster import ray_cluster
from persimmon.tokenizer import Tokenizer

_BATCH = 32
"""Lines that an actor gets at once: what is answered again, at most, when it is lost."""


class Answerer:
    """An actor with an engine."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        """`build` loads the model, in the actor's process."""
        self._engine = build()

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[str]]:
        """Pickled jobs in, lines of the output out."""
        jobs = [pickle.loads(job) for job in batch["job"]]
        return {"line": [json.dumps(line) for line in run_jobs(self._engine, jobs)]}


def answer_file_on_ray(
    build: Callable[[], Engine],
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    sampling: Mapping[str, Any],
    *,
    engines: int,
    cpus: float = 1,
    gpus: float = 0,
    batch: int = _BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """`batch.answer_file` with so many engines, each with its share of cores and GPUs.

    RAY_ADDRESS names a cluster; without it, Ray is started on this machine, reachable from nowhere else, and ended.
    """
    if engines < 1:
        raise InputError(f"the number of engines must be 1 or more, got {engines}")
    ray = _import_ray()
    jobs, tally = open_jobs(source, target, tokenizer, sampling)
    if not jobs:
        return tally
    with ray_cluster(ray, cores=engines * cpus + 1):
        lines = _answers(ray, build, jobs, engines, cpus, gpus, min(batch, -(-len(jobs) // engines)))
        return write_answers(target, lines, tally, progress=progress)


def _answers(
    ray: Any, build: Callable[[], Engine], jobs: Sequence[Job], engines: int, cpus: float, gpus: float, batch: int
) -> Iterator[dict[str, Any]]:
    """The lines of the answers, batch by batch as they are finished."""
    rows = [{"job": pickle.dumps(job)} for job in jobs]
    found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch)).map_batches(
        Answerer, fn_constructor_args=(build,), batch_size=batch, num_cpus=cpus, num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=engines),
    )  # fmt: skip
    for row in found.iter_rows():
        yield json.loads(row["line"])


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UnavailableError(f"batches on several engines need {error.name}: pip install 'persimmon[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller shows the progress
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
