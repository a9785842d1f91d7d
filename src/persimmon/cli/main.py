"""`persimmon VERB ...`: finds the verb's module, runs it, and turns errors into one line and an exit code.

A verb is a module with `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`, and imports what is
heavy inside `run`, so that help and version take milliseconds.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from persimmon.cli.console import warn
from persimmon.errors import PersimmonError, StorageError

VERB_GROUPS: dict[str, dict[str, str]] = {
    "Use a model": {
        "chat": "persimmon.cli.chat",
        "generate": "persimmon.cli.generate",
        "serve": "persimmon.cli.serve",
        "tokenize": "persimmon.cli.tokenize",
    },
    "Look at models and convert them": {
        "info": "persimmon.cli.info",
        "import": "persimmon.cli.import_",
        "export": "persimmon.cli.export",
        "prune-vocab": "persimmon.cli.prune_vocab",
        "quantize": "persimmon.cli.quantize",
        "sparsity": "persimmon.cli.sparsity",
        "synthesize": "persimmon.cli.synthesize",
    },
    "Evaluate": {
        "eval": "persimmon.cli.eval",
        "compare": "persimmon.cli.compare",
    },
    "Train": {
        "tokenizer": "persimmon.cli.tokenizer",
        "data": "persimmon.cli.data",
        "pretrain": "persimmon.cli.pretrain",
        "finetune": "persimmon.cli.finetune",
        "merge": "persimmon.cli.merge",
    },
    "This machine": {
        "doctor": "persimmon.cli.doctor",
        "bench": "persimmon.cli.bench",
    },
}
VERBS = {verb: module for group in VERB_GROUPS.values() for verb, module in group.items()}

# What people type who come from other tools.
OTHER_TOOLS_VERBS = {
    "download": "import", "pull": "import", "convert": "import", "run": "chat", "complete": "generate",
    "ls": "info", "list": "info", "show": "info", "train": "pretrain", "sft": "finetune", "env": "doctor",
}  # fmt: skip
OTHER_TOOLS_FLAGS = {
    "--max-new-tokens": "--max-tokens", "--n-predict": "--max-tokens", "--temp": "--temperature",
    "--max-model-len": "--context", "--ctx-size": "--context", "--repeat-penalty": "--repetition-penalty",
    "--model": "MODEL (without a flag)", "--quantization": "--dtype",
}  # fmt: skip

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts no abbreviations and names the flag that was probably meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _formatter, **settings})

    def format_usage(self) -> str:
        """One line: the program and its positional arguments."""
        self._shorten_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """The short usage and everything there is to say."""
        self._shorten_usage()
        return super().format_help()

    def _shorten_usage(self) -> None:
        """Leave the flags out of the usage: the help lists them below, with what they do."""
        if self.usage is None:
            formatter = self._get_formatter()
            formatter.add_usage(None, self._get_positional_actions(), [], prefix="")
            self.usage = f"{formatter.format_help().strip()} [options]"

    def error(self, message: str) -> NoReturn:
        """Usage and one line on stderr, exit code 2."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"persimmon: error: {message}\n")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse everything; an unknown flag is an error with a suggestion."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {flag}{self._suggestion(flag)}")
        return args

    def _suggestion(self, flag: str) -> str:
        spelled = flag.replace("_", "-").lower()
        meant = spelled if spelled in self._option_string_actions else OTHER_TOOLS_FLAGS.get(spelled)
        close = difflib.get_close_matches(spelled, self._option_string_actions, n=1)
        if spelled.startswith("--") and (meant or close):
            return f"; did you mean {meant or close[0]}?"
        return ""


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30)


def verb_module(verb: str) -> ModuleType:
    """The module behind a verb of the table."""
    return importlib.import_module(VERBS[verb])


def verb_parser(verb: str) -> Parser:
    """The complete parser of one verb."""
    module = verb_module(verb)
    parser = Parser(prog=f"persimmon {verb}", description=f"{module.HELP[0].upper()}{module.HELP[1:]}.")
    module.add_arguments(parser)
    return parser


def help_text() -> str:
    """The page that `persimmon --help` prints."""
    lines = [
        "usage: persimmon VERB [MODEL] [options]   (persimmon VERB --help explains a verb)",
        "       persimmon --help | --version",
        "",
        "Run, chat with, examine and train Persimmon language models.",
    ]
    width = max(map(len, VERBS)) + 2
    for group, verbs in VERB_GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {verb:<{width}}{verb_module(verb).HELP}" for verb in verbs]
    lines += [
        "",
        "MODEL is a directory, a Hugging Face Hub id or a name: mini (shipped, the default),",
        "persimmon-8b-base, persimmon-8b-chat. PERSIMMON_MODEL sets another default.",
        "--debug, anywhere, shows the traceback of an error.",
    ]
    return "\n".join(lines)


def version_text() -> str:
    """Versions of the package and of torch, the engines that can run and those that cannot; imports neither."""
    from importlib import metadata  # a slow import that help does not need

    from persimmon import __version__
    from persimmon.engines import installed_engines, missing_engines

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    engines = "; ".join(f"{name} ({summary})" for name, summary in installed_engines().items())
    lines = [f"persimmon {__version__}", f"torch {torch}", f"engines {engines}"]
    return "\n".join(lines + [f"missing {name} ({reason})" for name, reason in missing_engines().items()])


def _unknown_verb(verb: str) -> str:
    close = difflib.get_close_matches(verb, [*VERBS, *OTHER_TOOLS_VERBS], n=1)
    if not close:
        return f"unknown verb {verb!r}; persimmon --help lists them"
    meant = OTHER_TOOLS_VERBS.get(close[0], close[0])
    return f"unknown verb {verb!r}; did you mean 'persimmon {meant}'? ({verb_module(meant).HELP})"


def _dispatch(argv: Sequence[str]) -> int:
    """Parse and run; argparse leaves by SystemExit."""
    first = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    front = Parser(prog="persimmon", usage="persimmon VERB [options]", add_help=False)
    for flags in (("-h", "--help"), ("--version",)):
        front.add_argument(*flags, action="store_true")
    options = front.parse_all(argv[:first])
    if options.help or options.version:
        print(version_text() if options.version else help_text())
        return EXIT_DONE
    if first == len(argv):
        print(help_text(), file=sys.stderr)
        return EXIT_USAGE
    verb, rest = argv[first], argv[first + 1 :]
    if verb not in VERBS:
        front.error(_unknown_verb(verb))
    arguments = verb_parser(verb).parse_all(rest)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        return int(verb_module(verb).run(arguments))


def _guarded(action: Callable[[], int], debug: bool) -> int:
    """Run `action`; every error becomes one line on stderr and an exit code."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: help and usage errors
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if stop.code is None else EXIT_FAILED
    except KeyboardInterrupt:
        print("\npersimmon: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, (PersimmonError, OSError))
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"persimmon: error: {error}{hint}", file=sys.stderr)
        failed = isinstance(error, (StorageError, RuntimeError))  # what a machine lacks, a training that went wrong
        usage = isinstance(error, PersimmonError) and not failed
        return EXIT_USAGE if usage else EXIT_FAILED


def _open_closed_streams() -> None:
    """A shell's `>&-` leaves None where a stream should be: what is written there is lost, reading finds nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open for the process's life)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show must not end a stream of text
    return _guarded(lambda: _dispatch([word for word in words if word != "--debug"]), debug)


if __name__ == "__main__":
    sys.exit(main())
