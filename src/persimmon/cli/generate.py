"""`persimmon generate`: continue a prompt on standard output, or answer a file of prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import (
    add_model_options,
    add_reading_options,
    add_sampling_options,
    check_readable,
    given_text,
    load_from,
    load_options,
    model_name,
    reading_from,
    sampling_from,
)

if TYPE_CHECKING:
    from persimmon.infer.completion import Generation
    from persimmon.infer.generate import Stream
    from persimmon.infer.sampling import TokenLogprob
    from persimmon.tokenizer import Tokenizer

HELP = "continue a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    text = parser.add_argument_group("the text")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input (default: -)")
    source.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue, in UTF-8")
    text.add_argument("--no-bos", action="store_true", help="put no begin-of-text token before the prompt")
    add_reading_options(text)
    text.add_argument("--json", action="store_true", help="print text, token ids, usage and timings as JSON")
    batch = parser.add_argument_group("many prompts")
    batch.add_argument("--input", metavar="FILE", help="JSON Lines, one prompt or conversation per line")
    batch.add_argument(
        "--output", metavar="FILE", help="one line per answer; answers that are there are kept, errors tried again"
    )
    batch.add_argument(
        "--ray", type=int, metavar="N", help="answer with N engines through Ray Data (RAY_ADDRESS: where)"
    )
    add_sampling_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    if args.input is not None or args.output is not None or args.ray is not None:
        return answer_prompts(args)
    from persimmon.cli.console import Progress, note, print_json

    sampling, reading, prompt = sampling_from(args), reading_from(args), read_prompt(args)
    model = load_from(args)
    with Progress("reading the prompt", quiet=args.quiet) as progress:
        stream = model.stream(
            prompt,
            bos=not args.no_bos,
            progress=progress,
            **reading,
            **sampling,
        )
        first = next(stream, None)
    if first is not None and not args.json:
        _print_text(first.text)
    _print_rest(stream, show=not args.json)
    result = stream.result()
    if args.json:
        facts = {"model": model_name(args), "engine": model.engine_name}
        print_json(facts | as_json(result, model.tokenizer))
    elif result.logprobs is not None:
        print("\n\n" + logprob_table(result.logprobs, model.tokenizer))
    elif sys.stdout.isatty():
        print()
    note(_summary(result), quiet=not args.verbose)
    return 0


def answer_prompts(args: argparse.Namespace) -> int:
    """Answer --input to --output; 1 when a line got an error for an answer."""
    from persimmon.checkpoints.download import model_config, resolve
    from persimmon.cli.console import Progress, note
    from persimmon.infer.batch import answer_file
    from persimmon.serve.build import EngineSettings
    from persimmon.tokenizer import Tokenizer

    source, target = _batch_files(args)
    sampling = sampling_from(args)
    model_config(model_name(args)).check_context(args.context)
    directory = resolve(model_name(args))
    build, tokenizer = EngineSettings(str(directory), load_options=load_options(args)), Tokenizer.load(directory)
    with Progress("answering", quiet=args.quiet) as progress:
        if args.ray is not None:
            from persimmon.infer.ray_batch import answer_file_on_ray

            share = {"cpus": args.threads or 1, "gpus": 1 if args.device.startswith("cuda") else 0}
            tally = answer_file_on_ray(
                build, tokenizer, source, target, sampling, engines=args.ray, progress=progress, **share
            )
        else:
            tally = answer_file(build, tokenizer, source, target, sampling, progress=progress)
    counts = f"{tally.answered} answered, {tally.failed} failed, {tally.skipped} were there already"
    note(f"{target}: {counts}", quiet=args.quiet)
    return 1 if tally.failed else 0


def _batch_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """--input and --output; InputError where one is missing or another option does not go with them."""
    from persimmon.errors import InputError

    if args.input is None or args.output is None:
        raise InputError("--input and --output belong together")
    for flag in ("prompt", "prompt_file", "prompt_cache", "lookup", "no_bos", "json"):
        if getattr(args, flag) not in (None, False, 0):
            raise InputError(f"--{flag.replace('_', '-')} does not go with --input")
    source, target = Path(args.input), Path(args.output)
    check_readable("--input", source)
    if target.exists() and target.samefile(source):
        raise InputError(f"--input and --output are the same file: {source}")
    return source, target


def read_prompt(args: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file; standard input for `-` and, unless it is a terminal, without either."""
    return given_text("prompt", ("--prompt", args.prompt), ("--prompt-file", args.prompt_file))


def _print_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_rest(stream: Stream, *, show: bool) -> None:
    for piece in stream:
        if show:
            _print_text(piece.text)


def as_json(result: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The result as JSON types, tokens of log-probabilities with their pieces."""
    document = dataclasses.asdict(result)
    document["usage"] = {**result.usage._asdict(), "total_tokens": result.usage.total_tokens}
    if result.logprobs is not None:
        document["logprobs"] = [
            {
                **_token(entry.token_id, entry.logprob, tokenizer),
                "alternatives": [_token(token_id, value, tokenizer) for token_id, value in entry.alternatives],
            }
            for entry in result.logprobs
        ]
    return document


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token_id": token_id, "piece": _piece(token_id, tokenizer), "logprob": logprob}


def _piece(token_id: int, tokenizer: Tokenizer) -> str:
    """The name of a piece; rows above the tokenizer's size have none."""
    return tokenizer.piece(token_id) if token_id < tokenizer.vocab_size else f"<row {token_id}>"


def logprob_table(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> str:
    """One line per token: its id, log-probability and piece, then the most likely ones."""
    lines = [f"{'id':>7}  {'logprob':>8}  piece"]
    for entry in entries:
        others = "  ".join(f"{_piece(i, tokenizer)!r} {value:.2f}" for i, value in entry.alternatives)
        piece = repr(_piece(entry.token_id, tokenizer))
        lines.append(f"{entry.token_id:>7}  {entry.logprob:>8.3f}  {piece:<18}{others}".rstrip())
    return "\n".join(lines)


def _summary(result: Generation) -> str:
    usage, timings = result.usage, result.timings
    cached = f" ({usage.cached_tokens} from the cache)" if usage.cached_tokens else ""
    guessed = f", {usage.accepted_tokens} of {usage.guessed_tokens} guessed right" if usage.guessed_tokens else ""
    return (
        f"prompt {usage.prompt_tokens} tokens{cached} in {timings.prefill_seconds:.2f} s; "
        f"{usage.completion_tokens} tokens at {timings.tokens_per_second:.1f} tokens/s{guessed}; "
        f"ended by {result.finish_reason}; seed {result.seed}"
    )
