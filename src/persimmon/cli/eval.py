"""`persimmon eval`: score a model on tasks, several variants of it if wanted, and write results and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import add_model_options, load_options, model_name
from persimmon.errors import DataError, InputError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from persimmon.evals.compare import Run
    from persimmon.evals.formats import Fidelity
    from persimmon.evals.language_model import DecoderLanguageModel, LanguageModel
    from persimmon.evals.runner import Settings, TaskRun
    from persimmon.evals.tasks.task import Task

HELP = "score a model on tasks"

FIDELITY_TEXTS = 20
"""Prompts of the tasks on which variants are compared when there are no documents."""

LOCAL_OPTIONS = (
    "device", "engine", "dtype", "threads", "rotary_precision", "kv_dtype", "sparsity_margin", "adapter", "no_bos",
    "cache_tokens", "variant",
)  # fmt: skip
"""Options that say how a model is loaded and run in this process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_options(parser)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--tasks", default="all", metavar="LIST",
        help="comma-separated: mmlu, winogrande, arc_easy, arc_challenge, triviaqa, hellaswag, humaneval (together: "
        "all, the default), needle, key_value (together: long), perplexity",
    )  # fmt: skip
    what.add_argument(
        "--style", default="both", choices=("adept", "loglikelihood", "both"),
        help="generate answers under the release's prompts, compare likelihoods as the harness, or both "
        "(default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--data", type=Path, metavar="DIR", help="directory with the sets (default: fetch from the Hub)")
    what.add_argument("--limit", type=int, metavar="N", help="most questions per task, drawn evenly, always the same")
    what.add_argument("--shots", type=int, metavar="N", help="worked examples (default: each task's own number)")
    what.add_argument("--chat", action="store_true", help="wrap prompts of generated answers in the chat format")
    what.add_argument(
        "--instructions",
        type=Path,
        metavar="FILE",
        help="JSON object: task name -> instruction line of the adept style",
    )
    what.add_argument(
        "--samples", type=int, default=1, metavar="N", help="completions per HumanEval problem, for pass@k"
    )
    what.add_argument("--temperature", type=float, default=0.0, metavar="X", help="of these completions (default: 0)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--out", type=Path, metavar="DIR", help="directory of results (default: evaluations/MODEL)")
    how.add_argument(
        "--url", metavar="URL", help="ask this OpenAI-compatible server (ending in /v1) instead of a model"
    )
    how.add_argument("--no-bos", action="store_true", help="put no begin-of-text token before prompts")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions per batch (default: 64)")
    how.add_argument(
        "--lanes", type=int, metavar="N", help="sequences side by side (default: 16; 64 on the cpu engine)"
    )
    how.add_argument(
        "--cache-tokens",
        type=int,
        default=65_536,
        metavar="N",
        help="tokens of keys and values at a time (default: 65536)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of sampled completions (default: 0)")
    how.add_argument(
        "--isolation", default="auto", choices=("auto", "bubblewrap", "landlock", "none"),
        help="sandbox for generated code; none keeps limits and the system-call filter only, files stay readable "
        "(default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...",
        help="also score the model so set up (dtype, rotary_precision, engine, model, or an engine's own option), and "
        "compare its predictions with the first (repeatable)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import note, print_json
    from persimmon.evals import compare, report, results

    settings = _settings(args)
    tasks = _tasks(args)
    variants = [("", {}), *map(_variant, args.variant)]
    if args.url:
        _refuse_local_options(args)
    label = _label(args)
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
        results.write_text(directory / "report.md", report.run_report(runs[-1]))
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


def _refuse_local_options(args: argparse.Namespace) -> None:
    """InputError for an option that sets up a model here, where a server is asked that has its own."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [name for name in LOCAL_OPTIONS if getattr(args, name) != parser.get_default(name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{flags}: this sets up a model here and does not go with --url")


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


# -- reading the arguments -----------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> Settings:
    from persimmon.evals.runner import Settings

    return Settings(
        shots=args.shots,
        limit=args.limit,
        batch_size=args.batch_size,
        chat=args.chat,
        samples=args.samples,
        temperature=args.temperature,
        instructions=_instructions(args.instructions),
    )


def _instructions(path: Path | None) -> Mapping[str, str]:
    from persimmon.evals.tasks import TASKS

    if path is None:
        return {}
    if not path.is_file():
        raise NotFoundError(f"--instructions {path} does not exist")
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--instructions {path}: {error}") from None
    if not isinstance(lines, dict) or not all(name in TASKS and isinstance(text, str) for name, text in lines.items()):
        raise InputError(f"--instructions {path} must be a JSON object of task names and texts")
    return lines


def _tasks(args: argparse.Namespace) -> list[tuple[Task, str]]:
    """(task, style) pairs to run; a task without the wanted style runs in the one it has."""
    from persimmon.evals.tasks import STYLES, find_tasks

    wanted = STYLES if args.style == "both" else (args.style,)
    pairs = []
    for task in find_tasks(args.tasks):
        styles = [style for style in wanted if style in task.styles] or list(task.styles)
        pairs += [(task, style) for style in styles]
    return pairs


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME:KEY=VALUE,...` -> name and options of persimmon.load; numbers become numbers."""
    name, colon, rest = text.partition(":")
    options = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    if not (colon and re.fullmatch(r"[\w.+-]+", name) and len(options) == len(rest.split(","))):
        raise InputError(f"--variant {text!r} is not NAME:KEY=VALUE,... (for instance bf16:dtype=bfloat16)")
    return name, {key.replace("-", "_"): _value(value) for key, value in options.items()}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _label(args: argparse.Namespace) -> str:
    name = args.url.split("//")[-1] if args.url else Path(model_name(args)).name
    return re.sub(r"[^\w.-]+", "_", name)


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
    from persimmon.evals import report, results
    from persimmon.evals.formats import measure
    from persimmon.evals.language_model import DecoderLanguageModel

    decoders: list[tuple[str, DecoderLanguageModel]] = [
        (name, model) for name, model in models if isinstance(model, DecoderLanguageModel)
    ]
    found = measure(decoders[0][1], decoders, _fidelity_texts(args, tasks, settings, models[0][1]))
    results.write_text(out / "fidelity.json", json.dumps([dataclasses.asdict(one) for one in found], indent=2) + "\n")
    results.write_text(out / "fidelity.md", report.fidelity_table(found) + "\n")
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


class TimedProgress:
    """Questions done and the time left: a line that is redrawn on a terminal, one line every half minute elsewhere."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self._label, self._quiet = label, quiet
        self._terminal = sys.stderr.isatty()
        self._start: tuple[float, int] | None = None
        self._said = 0.0

    def __enter__(self) -> TimedProgress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Report; the rate counts from the first call, so that resumed questions do not."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
            self._said = now if not self._terminal else 0.0
        if self._quiet or (done < total and now - self._said < (0.1 if self._terminal else 30.0)):
            return
        self._said = now
        began, before = self._start
        left = (now - began) / (done - before) * (total - done) if done > before else None
        times = f"{_clock(now - began)} gone" + ("" if left is None or done == total else f", {_clock(left)} left")
        text = f"{self._label}: {done}/{total} questions, {times}"
        sys.stderr.write(f"\r\x1b[2K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._terminal and not self._quiet and self._start is not None:
            sys.stderr.write("\n")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
