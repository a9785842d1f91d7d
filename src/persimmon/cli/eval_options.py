"""The arguments of `persimmon eval` and what they say, checked before a model is loaded."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import add_model_options, model_name
from persimmon.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from persimmon.evals.runner import Settings
    from persimmon.evals.tasks.task import Task

LOCAL_OPTIONS = (
    "device", "engine", "dtype", "threads", "rotary_precision", "kv_dtype", "sparsity_margin", "adapter", "no_bos",
    "cache_tokens", "variant",
)  # fmt: skip
"""Options that say how a model is loaded and run in this process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_options(parser)
    _add_what(parser.add_argument_group("what is scored"))
    _add_how(parser.add_argument_group("how it runs"))
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")


def _add_what(what: argparse._ArgumentGroup) -> None:
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


def _add_how(how: argparse._ArgumentGroup) -> None:
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


def settings_from(args: argparse.Namespace) -> Settings:
    """How every task is run. Raises InputError and NotFoundError for what cannot be."""
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


def tasks_from(args: argparse.Namespace) -> list[tuple[Task, str]]:
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


def variants_from(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """(name, changed options) of everything that is scored; the model as given comes first, without a name."""
    variants: list[tuple[str, dict[str, Any]]] = [("", {}), *map(_variant, args.variant)]
    if args.url:
        _refuse_local_options(args)
    else:
        _check_contexts(args, variants)
    return variants


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def label_of(args: argparse.Namespace) -> str:
    """The name of the run: the model's, or the server's address, as a file name."""
    name = args.url.split("//")[-1] if args.url else Path(model_name(args)).name
    return re.sub(r"[^\w.-]+", "_", name)


def _refuse_local_options(args: argparse.Namespace) -> None:
    """InputError for an option that sets up a model here, where a server is asked that has its own."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [name for name in LOCAL_OPTIONS if getattr(args, name) != parser.get_default(name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{flags}: this sets up a model here and does not go with --url")


def _check_contexts(args: argparse.Namespace, variants: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """InputError for a context that a model lacks, by its config.json: before the first variant is loaded."""
    from persimmon.checkpoints.download import model_config

    for _, options in variants:
        context = options.get("context", args.context)
        if context is None:
            continue
        if not isinstance(context, int):
            raise InputError(f"--variant: context must be a whole number, got {context!r}")
        model_config(str(options.get("model") or model_name(args))).check_context(context)
