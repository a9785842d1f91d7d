"""What quantizing and skipping cost in quality: every packed format of a model against its float32 weights, on a text.

    python benchmarks/quality.py MODEL... --text FILE [--tokens N] [--out benchmarks/results]

For each MODEL (a directory or a name) the packed forms are made in a temporary directory. A text, cut to N tokens,
runs through each and through the float32 weights in windows of 512 tokens: perplexity, KL divergence in nats per token,
share of equal top tokens. `p44`, the one format with a margin, runs at the default margin and at `inf`, which skips
only what is zero; for the others the margin changes nothing. Keys and values are what the engine takes by default
(float32 for float32 weights, int8 for packed ones), so their rounding is part of the figures.

Greedy ids: for each of a few prompts cut from the text, the answer generated token by token at margin `inf` (which
skips zeros) is compared with the most likely tokens of one dense pass over it (many tokens at once, the vocabulary in
full): they must be equal. The same count at the default margin says how far answers stay the same.

Writes quality-NAME.json beside the other results and prints it; a target that is missed is named in it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from persimmon.checkpoints.download import resolve
from persimmon.fast.cpu.decoder import DEFAULT_MARGIN, CpuDecoder
from persimmon.fast.cpu.fidelity import Fidelity, compare
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.quantize import quantize
from persimmon.infer.decoder import Chunk
from persimmon.infer.session import Session
from persimmon.machine import cpu_name
from persimmon.tokenizer import Tokenizer

FORMATS = ("q8", "q4", "p44")
PERPLEXITY_LIMITS = {"q8": 0.001, "q4": 0.01, "p44": 0.01}
"""Relative to float32: the project's targets."""
MARGIN_KL_SHARE, MARGIN_PERPLEXITY = 0.1, 0.001
"""What the default margin may add to the format's own KL, as a share of it, and to perplexity."""

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 64, 64


def read_text(path: Path) -> str:
    """A text file, or the `text` of JSON Lines, gzip-compressed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if ".jsonl" in path.suffixes:
        return "\n\n".join(json.loads(line)["text"] for line in data.decode().splitlines())
    return data.decode()


def greedy(decoder: CpuDecoder, prompt: Sequence[int]) -> list[int]:
    """The most likely tokens, one after the other."""
    session = Session(decoder, len(prompt) + ANSWER_TOKENS)
    answer = [int(session.prefill(prompt, exact_top=1).argmax())]
    while len(answer) < ANSWER_TOKENS:
        answer.append(int(session.extend(answer[-1], exact_top=1).argmax()))
    session.close()
    return answer


def dense(decoder: CpuDecoder, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The most likely tokens at the places of an answer, from one pass over it with all logits."""
    ids = [*prompt, *answer[:-1]]
    sequence = decoder.new_sequence(len(ids))
    (logits,) = decoder.forward([Chunk(sequence, ids, "all")])
    sequence.close()
    assert logits is not None
    return [int(row.argmax()) for row in logits[len(prompt) - 1 :]]


def equal_prompts(answers: Sequence[list[int]], others: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(answers, others, strict=True))


def figures(fidelity: Fidelity) -> dict[str, float]:
    row = {name: round(value, 7) for name, value in asdict(fidelity).items()}
    return row | {"perplexity_change": round(fidelity.perplexity_change, 7)}


def measure_format(
    name: str, packed: Path, source: CpuDecoder, ids: list[int], prompts: list[list[int]]
) -> dict[str, Any]:
    """One format: fidelity, greedy ids, and which targets it misses."""
    default = load_decoder(packed)
    exact = load_decoder(packed, sparsity_margin=math.inf)
    found = compare(source, default, ids)
    answers = [greedy(exact, prompt) for prompt in prompts]
    checked = [dense(exact, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    row: dict[str, Any] = {
        "default_margin": figures(found),
        "greedy_equal_to_dense": equal_prompts(answers, checked),
        "greedy_equal_at_default_margin": equal_prompts(answers, [greedy(default, prompt) for prompt in prompts]),
        "bytes": sum(file.stat().st_size for file in packed.glob("*.safetensors")),
    }
    targets = {
        f"perplexity within {PERPLEXITY_LIMITS[name]:.1%}": abs(found.perplexity_change) < PERPLEXITY_LIMITS[name],
        "greedy ids of margin inf equal the dense pass": row["greedy_equal_to_dense"] == len(prompts),
    }
    if name == "p44":
        whole = compare(source, exact, ids)
        added_kl, added_perplexity = found.kl / whole.kl - 1, found.perplexity / whole.perplexity - 1
        row |= {
            "margin_inf": figures(whole),
            "kl_added_by_margin": round(added_kl, 5),
            "perplexity_added_by_margin": round(added_perplexity, 7),
        }
        targets |= {
            "margin adds less than a tenth of the KL": added_kl < MARGIN_KL_SHARE,
            "margin changes perplexity by less than 0.1%": abs(added_perplexity) < MARGIN_PERPLEXITY,
        }
    return row | {"targets": targets}


def measure(model: str, text: str, tokens: int) -> dict[str, Any]:
    """All formats of one model."""
    directory = resolve(model)
    ids = Tokenizer.load(directory).encode(text[: 12 * tokens], bos=True)[:tokens]
    starts = np.linspace(0, len(ids) - PROMPT_TOKENS, PROMPTS).astype(int)
    prompts = [ids[start : start + PROMPT_TOKENS] for start in starts]
    source = load_decoder(directory, dtype="float32")
    formats = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FORMATS:
            packed = Path(scratch) / name
            quantize(directory, packed, name)
            formats[name] = measure_format(name, packed, source, ids, prompts)
            print(json.dumps({"model": model, "format": name, **formats[name]}), file=sys.stderr)
    return {
        "report": "quality",
        "model": Path(model).name,
        "tokens": len(ids) - 1,
        "prompts": len(prompts),
        "answer_tokens": ANSWER_TOKENS,
        "default_margin": DEFAULT_MARGIN,
        "formats": formats,
        "missed": [
            f"{name}: {what}" for name, row in formats.items() for what, met in row["targets"].items() if not met
        ],
        "machine": f"{cpu_name()}, {source.threads} threads, {source.isa}",
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--text", type=Path, required=True, help="held-out text: plain, or JSON Lines with a field `text`"
    )
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    text = read_text(args.text)
    for model in args.models:
        result = measure(model, text, args.tokens) | {"text": args.text.name}
        (args.out / f"quality-{Path(model).name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
