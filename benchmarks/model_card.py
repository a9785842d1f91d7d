"""Measure a small trained model for its card: bits per byte beside compressors, zeros, dead neurons, samples.

    python benchmarks/model_card.py MODEL DATA --out benchmarks/results/mini.json

MODEL is a model directory or name, DATA the output of `persimmon data prepare` (its held-out documents are read).
Every document is coded from its own start by every method, so that long and short ones count as they are.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import sys
from pathlib import Path
from typing import Any

import pyppmd
import torch

import persimmon
from persimmon.checkpoints import hub
from persimmon.data.documents import read_documents
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.evaluate import bits_per_byte
from persimmon.train.sparsity import LayerStatistics, shares_of_zeros, silent_neurons

_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
_PPMD_ORDER = 8
_PPMD_SMALL, _PPMD_LARGE, _PPMD_LIMIT = (
    32 << 20,
    256 << 20,
    200_000,
)  # bytes of memory; documents above the limit get more
_TOKENS_PER_DOCUMENT = 2048
"""Tokens of each held-out document whose zeros are counted."""

PROMPTS = ("It was a cold morning, and the old man", "This document describes", "def add_numbers(a, b):\n    ")
QUESTIONS = ("I would like to book a table at a restaurant.", "What is 12 plus 7?", "Tell me a short story.")


def compressed_bits(texts: list[str]) -> dict[str, float]:
    """Bits per byte of xz -9e and PPMd (order 8), document by document."""
    raw = [text.encode() for text in texts]
    total = sum(map(len, raw))
    xz = sum(len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=_XZ)) for data in raw)
    ppmd = sum(
        len(pyppmd.compress(d, max_order=_PPMD_ORDER, mem_size=_PPMD_LARGE if len(d) > _PPMD_LIMIT else _PPMD_SMALL))
        for d in raw
    )
    return {"xz -9e": round(8 * xz / total, 4), "PPMd order 8": round(8 * ppmd / total, 4)}


@torch.inference_mode()
def activity_per_layer(model: PersimmonModel, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """Share of zeros after the squared ReLU, and neurons never active, over the first tokens of every document."""
    statistics = LayerStatistics(model.config.num_layers, target=0.0, penalize=False)
    for text in texts:
        ids = tokenizer.encode(text[: 8 * _TOKENS_PER_DOCUMENT], bos=True)[:_TOKENS_PER_DOCUMENT]
        model.features(torch.tensor([ids]), observe=statistics)
    counts = statistics.counts()
    return {
        "tokens_counted": int(counts[0, -1]),
        "zeros_per_layer": [round(share, 4) for share in shares_of_zeros(counts).tolist()],
        "never_active_per_layer": silent_neurons(counts).tolist(),
    }


def measure_source(model: PersimmonModel, tokenizer: Tokenizer, file: Path, window: int | None) -> dict[str, Any]:
    """All figures of one source's held-out documents; without bits per byte when there is no window."""
    texts = [document.text for document in read_documents(file)]
    facts = {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        **activity_per_layer(model, tokenizer, texts),
    }
    if window is None:
        return facts

    def progress(done: int) -> None:
        print(f"\r{file.name}: {done} of {len(texts)} documents", end="", file=sys.stderr, flush=True)

    bits = bits_per_byte(model, tokenizer, texts, window=window, progress=progress)
    print(file=sys.stderr)
    return {**facts, "bits_per_byte": {"model": round(bits, 4), **compressed_bits(texts)}}


def samples(directory: Path, is_chat: bool) -> list[dict[str, str]]:
    """Continuations or answers as they come, seed 0, temperature 0.7, top-k 40."""
    model = persimmon.load(str(directory))
    settings: dict[str, Any] = {"max_tokens": 80, "temperature": 0.7, "top_k": 40, "seed": 0}
    if is_chat:
        asked = [(q, model.chat([{"role": "user", "content": q}], **settings).text) for q in QUESTIONS]
    else:
        asked = [(prompt, model.generate(prompt, **settings).text) for prompt in PROMPTS]
    return [{"prompt": prompt, "text": text} for prompt, text in asked]


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=4096, help="tokens of context at most (default %(default)s)")
    parser.add_argument("--chat", action="store_true", help="sample answers, and leave the bits per byte out")
    args = parser.parse_args()
    directory = hub.resolve(args.model)
    model = hub.load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = Tokenizer.load(directory)
    window = None if args.chat else args.window
    result = {
        "model": args.model,
        "window": window,
        "sources": {
            file.name.split(".")[1]: measure_source(model, tokenizer, file, window)
            for file in sorted(args.data.glob("held_out.*.jsonl.gz"))
        },
        "samples": samples(directory, args.chat),
        "versions": {
            "persimmon": persimmon.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "cores": torch.get_num_threads()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
