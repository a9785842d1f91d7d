"""The options that every verb with a model shares, and the model they load."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.infer.params import CONTEXT_OVERFLOWS, SamplingParams

if TYPE_CHECKING:
    from persimmon.api import Persimmon

DEFAULT_MODEL = "mini"

WEIGHTS_HELP = (
    "weights mapped (shared with other processes), resident (copied into large pages, faster) or auto: "
    "resident where the memory is free (cpu engine)"
)


def add_verb(verbs: Any, name: str, meaning: str) -> argparse.ArgumentParser:
    """The parser of a verb of a verb (`verbs` is from `add_subparsers`), whose meaning heads its own help as well."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}."
    )
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL: a directory, a hub id or a name."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"directory, hub id or name (default: $PERSIMMON_MODEL or {DEFAULT_MODEL})",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to run it; read them back with `load_from`."""
    add_model_argument(parser)
    group = parser.add_argument_group("how the model runs")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--engine", default="auto", metavar="NAME", help="auto, cpu, reference or cuda")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="auto, float32 or bfloat16")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument("--context", type=int, metavar="N", help="longest context in tokens (default: the model's)")
    group.add_argument(
        "--rotary-precision",
        default="checkpoint",
        metavar="NAME",
        help="checkpoint (what its config.json says), float32, or bfloat16 as the release computed positions",
    )
    group.add_argument("--kv-dtype", metavar="NAME", help="keys and values in float32 or int8 (cpu engine)")
    group.add_argument(
        "--sparsity-margin",
        type=float,
        metavar="K",
        help="deviations below zero at which a p44 neuron is skipped; inf skips none (cpu engine, default 0.5)",
    )
    group.add_argument("--weights", metavar="NAME", help=WEIGHTS_HELP)
    group.add_argument("--adapter", metavar="DIR", help="run with this LoRA adapter (PEFT's form)")
    group.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")
    group.add_argument("--verbose", action="store_true", help="say what was chosen and how long things took")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are picked; read them back with `sampling_from`."""
    defaults = SamplingParams()
    group = parser.add_argument_group("how tokens are picked")

    def add(flag: str, kind: Callable[[str], Any], meaning: str, metavar: str = "X") -> None:
        default = getattr(defaults, flag[2:].replace("-", "_"))
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{meaning} (default: {default})")

    add("--max-tokens", int, "most tokens to generate", "N")
    add("--temperature", float, "randomness; 0 always takes the most likely token")
    add("--top-p", float, "keep the most likely tokens that together reach this probability")
    add("--top-k", int, "keep the k most likely tokens; 0 keeps all", "N")
    add("--min-p", float, "keep tokens at least this share as likely as the best")
    add("--repetition-penalty", float, "above 1 makes tokens of the prompt and the answer less likely")
    add("--presence-penalty", float, "subtracted from the logits of tokens in the answer")
    add("--frequency-penalty", float, "the same, once per occurrence")
    group.add_argument(
        "--logit-bias", type=_logit_bias, action="append", default=[], metavar="ID=X",
        help="added to the logit of a token, -100 to 100 (repeatable)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default: a fresh one)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="text that ends the answer and is not part of it, taken literally (repeatable)",
    )  # fmt: skip
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="report log-probabilities: of each token and of the N most likely"
    )
    group.add_argument(
        "--context-overflow", choices=CONTEXT_OVERFLOWS, default=defaults.context_overflow,
        help="a full context: refuse (error), drop the oldest of the prompt (truncate-left), or let the oldest half "
        "go whenever it is full (shift) (default: %(default)s)",
    )  # fmt: skip


def _logit_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X, as in 1=-100") from None


def sampling_from(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the options of `add_sampling_options` describe, checked."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingParams)}
    settings["logit_bias"] = dict(args.logit_bias)
    SamplingParams(**settings)  # a wrong value shows before a model is loaded
    return settings


def add_reading_options(group: argparse._ArgumentGroup) -> None:
    """How a prompt is read and continued faster, with the same text; read them back with `reading_from`."""
    group.add_argument(
        "--prompt-cache", metavar="FILE",
        help="keeps what was read of the prompt, so that a long one is read once; made if it is not there",
    )  # fmt: skip
    group.add_argument(
        "--lookup", type=int, default=0, metavar="N",
        help="guess up to N tokens from the text itself and check them in one go; the text is the same (default: 0)",
    )  # fmt: skip


def reading_from(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the options of `add_reading_options` describe, checked."""
    from persimmon.infer.lookup import check_lookup
    from persimmon.infer.prompt_file import check_place

    check_lookup(args.lookup)  # what is wrong shows before a model is loaded
    if args.prompt_cache is not None:
        check_place(Path(args.prompt_cache))
    return {"lookup": args.lookup, "prompt_cache": args.prompt_cache}


def check_readable(flag: str, path: Path) -> None:
    """NotFoundError for a path that is not there, InputError for a directory; pipes and devices are files."""
    from persimmon.errors import InputError, NotFoundError

    if path.is_dir():
        raise InputError(f"{flag} {path} is a directory, not a file")
    if not path.exists():
        raise NotFoundError(f"{flag} {path} does not exist")


def given_text(what: str, direct: tuple[str, str | None], file: tuple[str, str | None]) -> str:
    """The text of a flag or of the file that another names; without either, or for `-`, standard input but no terminal.

    direct, file: the two flags and their values. Raises InputError and NotFoundError, which name them.
    """
    from persimmon.errors import InputError

    (text_flag, text), (file_flag, name) = direct, file
    if text is not None and text != "-":
        return text
    if name is not None and name != "-":
        path = Path(name)
        check_readable(file_flag, path)
        source, content = str(path), path.read_bytes()
    elif text is None and name is None and sys.stdin.isatty():
        raise InputError(f"no {what}: give {text_flag} TEXT or {file_flag} FILE, or pipe a text in")
    else:
        source, content = "standard input", sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8: byte {error.start}") from None


def checked_source(directory: Path, *, quiet: bool) -> Path:
    """The model directory that another is made from, its weights compared with its checksums where it has them."""
    from persimmon.checkpoints.checksums import verify_checksums
    from persimmon.cli.console import Progress

    with Progress("checking SHA-256", quiet=quiet) as progress:
        verify_checksums(directory, progress, weights_only=True)
    return directory


def read_text(name: str) -> str:
    """A text file that a measurement reads. Raises NotFoundError or InputError with its name."""
    from persimmon.errors import InputError, NotFoundError

    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"no text at {name}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{name} is not a UTF-8 text: {error}") from None


def model_name(args: argparse.Namespace) -> str:
    """MODEL as given, or the default."""
    return str(args.model or os.environ.get("PERSIMMON_MODEL") or DEFAULT_MODEL)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `persimmon.load` that the options of `add_model_options` describe."""
    names = ("device", "engine", "dtype", "threads", "context", "rotary_precision")
    options = {name: getattr(args, name) for name in names}
    given = {name: getattr(args, name) for name in ("kv_dtype", "sparsity_margin", "weights", "adapter")}
    return options | {name: value for name, value in given.items() if value is not None}


def load_from(args: argparse.Namespace) -> Persimmon:
    """The model that the options of `add_model_options` describe."""
    from persimmon.api import load
    from persimmon.cli.console import note

    model = load(model_name(args), **load_options(args))
    if args.verbose:
        for line in model.choices:
            note(line)
    return model
