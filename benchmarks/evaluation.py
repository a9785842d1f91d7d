"""Batched evaluation against a one-by-one transformers loop on the same weights: speed, and whether scores agree.

    python benchmarks/evaluation.py mini --data DATA/eval --tasks arc_easy,hellaswag --limit 100 --out FILE

Both sides get the same token ids: for every choice of every question a context and a continuation. Ours are answered as
`persimmon eval` does it, the peer's by one forward pass each. Tokens per second count every context anew on both sides,
so that sharing it shows as speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persimmon.accounting import decoding_flops_per_token
from persimmon.bench.ceiling import Ceiling
from persimmon.bench.decode import against_fields
from persimmon.bench.peers import ScriptPeer
from persimmon.bench.row import Row, finished, line, write
from persimmon.bench.timing import Stopwatch, alternate, percent_of
from persimmon.checkpoints.download import resolve
from persimmon.errors import DataError
from persimmon.evals.data import read_records
from persimmon.evals.language_model import DecoderLanguageModel
from persimmon.evals.loading import load_language_model
from persimmon.evals.runner import Item, Settings, TaskRun, prepare, run_task
from persimmon.evals.tasks import find_tasks
from persimmon.evals.tasks.task import Score, Task
from persimmon.machine import cpu_threads
from persimmon.tokenizer import Tokenizer, split_continuation

STYLE = "loglikelihood"

MOST_DIFFERENCE = 1e-3
"""Of the sums of log-probabilities, in nats: both sides compute in float32 and sum in different orders."""

Work = list[tuple[Task, list[Item]]]
Pairs = list[tuple[list[int], list[int]]]


def questions(names: str, data: Path, limit: int) -> Work:
    """The questions of every task."""
    work: Work = []
    for task in find_tasks(names):
        records = read_records(task.source, data)
        work.append((task, prepare(task, STYLE, records, [], Settings(limit=limit, shots=0))))
    return work


def token_pairs(work: Work, tokenizer: Tokenizer) -> Pairs:
    """(context ids, continuation ids) of every score that is asked for, in the order of the questions."""
    pairs: Pairs = []
    for _, items in work:
        for request in (request for item in items for request in item.question.requests):
            if not isinstance(request, Score):
                raise DataError(f"a {type(request).__name__} request cannot be compared: choose tasks with choices")
            context, continuation = split_continuation(tokenizer, request.context, request.continuation)
            pairs.append(([tokenizer.bos_id, *context], continuation))
    return pairs


def run_ours(model: DecoderLanguageModel, work: Work) -> list[TaskRun]:
    """Every task as `persimmon eval` runs it, without a journal."""
    return [run_task(task, STYLE, items, model, Settings()) for task, items in work]


def our_scores(runs: Sequence[TaskRun]) -> list[float]:
    """Sums of log-probabilities in the order of the questions."""
    return [response["log_probability"] for run in runs for answer in run.answers for response in answer.responses]


def evaluation_row(args: argparse.Namespace, ceiling: Ceiling, folder: Path) -> Row:
    """Measure both sides in turns, and compare every score."""
    directory = resolve(args.model)
    work = questions(args.tasks, args.data, args.limit)
    threads = args.threads or cpu_threads()
    model = load_language_model(args.model, options={"threads": threads})
    pairs = token_pairs(work, model.tokenizer)
    tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    scores: list[float] = []

    def ours() -> float:
        with Stopwatch() as watch:
            runs = run_ours(model, work)
        scores[:] = our_scores(runs)
        return tokens / watch.seconds

    settings: dict[str, Any] = {
        "directory": str(directory), "dtype": "float32", "threads": threads,
        "pairs": str(folder / "pairs.json"), "scores": str(folder / "scores.json"),
    }  # fmt: skip
    peer = ScriptPeer("transformers_scoring.py", settings)
    try:
        both = alternate(ours, peer.run, args.runs)
    finally:
        peer.close()
    theirs = json.loads((folder / "scores.json").read_text())
    difference = max(abs(a - b) for a, b in zip(scores, theirs, strict=True))
    config, context = model.decoder.config, round(tokens / len(pairs))
    limit = ceiling.again()
    most = limit.value * 1e9 / decoding_flops_per_token(config, context)
    return finished(
        {
            "bench": "eval",
            "model": Path(args.model).name,
            "engine": model.decoder.name,
            "format": str(model.decoder.form.name if hasattr(model.decoder, "form") else model.identity["dtype"]),
            "threads": threads,
            "context": context,
            "tasks": args.tasks.split(","),
            "questions": sum(len(items) for _, items in work),
            "scores": len(pairs),
            "largest_score_difference": difference,
            "same_scores": difference <= MOST_DIFFERENCE,
            "tokens_per_second": both.ours.median,
            "runs": list(both.ours.values),
            "bytes_per_token": None,
            "bytes_per_token_dense": None,
            "bandwidth_gb_s": None,
            "gemm_gflops": {limit.method: limit.value, **limit.others},
            "ceiling_tokens_per_second": most,
            "percent_of_ceiling": percent_of(both.ours.median, most),
            **against_fields(peer, both.peer, both.ratios),
        }
    )


def main() -> int:
    """Measure, print and keep the row; 1 when the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mini")
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation sets")
    parser.add_argument("--tasks", default="arc_easy,hellaswag", help="with choices to score (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=100, help="questions per task (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--out", type=Path, help="keep the row there")
    args = parser.parse_args()
    ceiling = Ceiling("gemm", args.threads or cpu_threads())
    print(ceiling.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        row = evaluation_row(args, ceiling, Path(folder))
    if args.out is not None:
        write(row, args.out)
    print(line(row))
    return 0 if row["same_scores"] else 1


if __name__ == "__main__":
    sys.exit(main())
