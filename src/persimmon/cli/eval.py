"""`persimmon eval`: score a model on tasks, several variants of it if wanted, and write results and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.atomic import write_text
from persimmon.cli.console import TimedProgress, note, print_json
from persimmon.cli.eval_options import add_arguments, label_of, settings_from, tasks_from, variants_from
from persimmon.cli.options import load_options, model_name
from persimmon.errors import DataError, InputError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from persimmon.evals.compare import Run
    from persimmon.evals.formats import Fidelity
    from persimmon.evals.language_model import DecoderLanguageModel, LanguageModel
    from persimmon.evals.runner import Settings, TaskRun
    from persimmon.evals.tasks.task import Task

__all__ = ["HELP", "add_arguments", "run"]

HELP = "score a model on tasks"

FIDELITY_TEXTS = 20
"""Prompts of the tasks on which variants are compared when there are no documents."""


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.evals import compare, report, results

    settings, tasks, variants, label = settings_from(args), tasks_from(args), variants_from(args), label_of(args)
    out = args.out or Path("evaluations") / label
    runs: list[Run] = []
    models: list[tuple[str, LanguageModel]] = []
    for name, options in variants:
        model = _model(args, options)
        directory = out / name if name else out
        done = _run_all(args, tasks, settings, model, directory)
        document = results.document(done, {**model.identity, "truncated": model.truncated}, _as_facts(settings, args))
        path = results.write(directory, done, document)
        runs.append(compare.load(path, name or label))
        write_text(directory / "report.md", report.run_report(runs[-1]))
        models.append((name or label, model))
        if model.truncated:
            note(f"{model.truncated} prompts were longer than the context and lost their beginning", quiet=args.quiet)
    fidelity = _fidelity(args, models, tasks, settings, out) if len(models) > 1 else []
    if args.json:
        print_json(_document(runs, fidelity))
    else:
        print("\n\n".join(_tables(runs, fidelity)))
    note(f"results and samples in {out}", quiet=args.quiet)
    return 0


def _document(runs: Sequence[Run], fidelity: Sequence[Fidelity]) -> dict[str, Any]:
    if len(runs) == 1:
        return runs[0].content
    return {
        "runs": {run.label: run.content for run in runs},
        "fidelity": [dataclasses.asdict(one) for one in fidelity],
    }


def _tables(runs: Sequence[Run], fidelity: Sequence[Fidelity]) -> list[str]:
    from persimmon.evals import report

    parts = [report.run_table(runs[0])] if len(runs) == 1 else [report.scores_table(runs)]
    if positions := report.positions_section(runs).strip():
        parts.append(positions)
    return [*parts, report.fidelity_table(fidelity)] if fidelity else parts


def _model(args: argparse.Namespace, options: Mapping[str, Any]) -> LanguageModel:
    if args.url:
        import os

        from persimmon.evals.server_model import ServerLanguageModel

        return ServerLanguageModel(
            args.url, args.model, api_key=os.environ.get("PERSIMMON_API_KEY") or os.environ.get("OPENAI_API_KEY"),
            context=args.context, concurrency=args.lanes or 16, seed=args.seed,
        )  # fmt: skip
    from persimmon.evals.loading import load_language_model

    given = {**load_options(args), **options}
    name = given.pop("model", None) or model_name(args)
    return load_language_model(
        str(name), bos=not args.no_bos, lanes=args.lanes, cache_tokens=args.cache_tokens, seed=args.seed, options=given
    )


def _as_facts(settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "data": args.data.name if args.data else "hub", "isolation": args.isolation}


# -- running -------------------------------------------------------------------------------------------


def _run_all(
    args: argparse.Namespace,
    tasks: Sequence[tuple[Task, str]],
    settings: Settings,
    model: LanguageModel,
    directory: Path,
) -> list[TaskRun]:
    """Every task in every style, each with its journal."""
    from persimmon.evals.runner import run_task

    run_program = None
    if any(task.styles[style].programs for task, style in tasks):
        from persimmon.evals.sandbox import open_sandbox

        run_program = open_sandbox(args.isolation).run
    done = []
    for task, style in tasks:
        items = _items(task, style, args.data, settings, model)
        with TimedProgress(f"{task.name} {style}", quiet=args.quiet) as progress:
            done.append(
                run_task(
                    task,
                    style,
                    items,
                    model,
                    settings,
                    journal=directory / "journal" / f"{task.name}-{style}.jsonl",
                    run_program=run_program,
                    progress=progress,
                )
            )
    return done


def _items(task: Task, style: str, data: Path | None, settings: Settings, model: LanguageModel) -> list[Any]:
    from persimmon.evals.data import read_records
    from persimmon.evals.runner import prepare

    if task.generate is not None:
        records, examples = task.generate(model.count_tokens, model.context), []
        if not records:
            raise InputError(f"{task.name} needs a context of at least 1024 tokens, the model has {model.context}")
    else:
        assert task.source is not None
        records = read_records(task.source, data)
        examples = read_records(task.examples, data) if task.examples else []
    return prepare(task, style, records, examples, settings)


def _fidelity(
    args: argparse.Namespace,
    models: Sequence[tuple[str, LanguageModel]],
    tasks: Sequence[tuple[Task, str]],
    settings: Settings,
    out: Path,
) -> list[Fidelity]:
    """Compare the predictions of all variants on the documents of the data directory, or on prompts of the tasks."""
    from persimmon.evals import report
    from persimmon.evals.formats import measure
    from persimmon.evals.language_model import DecoderLanguageModel

    decoders: list[tuple[str, DecoderLanguageModel]] = [
        (name, model) for name, model in models if isinstance(model, DecoderLanguageModel)
    ]
    found = measure(decoders[0][1], decoders, _fidelity_texts(args, tasks, settings, models[0][1]))
    write_text(out / "fidelity.json", json.dumps([dataclasses.asdict(one) for one in found], indent=2) + "\n")
    write_text(out / "fidelity.md", report.fidelity_table(found) + "\n")
    return found


def _fidelity_texts(
    args: argparse.Namespace, tasks: Sequence[tuple[Task, str]], settings: Settings, model: LanguageModel
) -> list[str]:
    from persimmon.evals.data import read_records
    from persimmon.evals.runner import prompts
    from persimmon.evals.tasks import TASKS

    source = TASKS["perplexity"].source
    assert source is not None
    try:
        return [str(record["text"]) for record in read_records(source, args.data)]
    except KeyError:
        raise DataError(f"{source.file}: a record lacks 'text'") from None
    except (NotFoundError, UnavailableError):
        items = [item for task, style in tasks for item in _items(task, style, args.data, settings, model)]
        return [prompts(item)[0] for item in items[:: max(1, len(items) // FIDELITY_TEXTS)]]
