"""Peer of benchmarks/evaluation.py: log-likelihoods by one forward pass per continuation, one after the other.

    python benchmarks/peers/transformers_scoring.py SETTINGS

SETTINGS name the model (see transformers_model.build), `pairs`, a JSON file with [context ids, continuation ids] per
continuation, and `scores`, a file to write the sums of log-probabilities to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers_model import answer_runs, build


def prepare(settings: dict[str, Any]) -> Callable[[], float]:
    """Load model and pairs."""
    model = build(settings)
    pairs = json.loads(Path(settings["pairs"]).read_text())

    @torch.inference_mode()
    def score(context: list[int], continuation: list[int]) -> float:
        logits = model(torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0]
        rows = logits[-len(continuation) :].float().log_softmax(-1)
        return float(rows.gather(1, torch.tensor(continuation)[:, None]).sum())

    def run() -> float:
        started = time.perf_counter()
        scores = [score(*pair) for pair in pairs]
        seconds = time.perf_counter() - started
        Path(settings["scores"]).write_text(json.dumps(scores))
        return sum(len(context) + len(continuation) for context, continuation in pairs) / seconds

    score(*pairs[0])
    return run


if __name__ == "__main__":
    answer_runs(prepare)
