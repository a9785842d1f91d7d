"""Peer of `persimmon bench decode`: greedy decoding behind a prompt, the prompt's own pass not counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers_model import answer_runs, build


def prepare(settings: dict[str, Any]) -> Callable[[], float]:
    """Load, and read the prompt once; every run goes back to its end."""
    model = build(settings)
    batch, depth, tokens = settings["batch"], settings["context"], settings["tokens"]
    cache = DynamicCache(config=model.config)
    prompt = torch.randint(0, model.config.vocab_size, (batch, depth))

    @torch.inference_mode()
    def step(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def run(steps: int = tokens) -> float:
        ids = torch.ones(batch, 1, dtype=torch.long)
        started = time.perf_counter()
        for _ in range(steps):
            ids = step(ids)
        seconds = time.perf_counter() - started
        cache.crop(-steps)  # transformers counts what to forget
        return steps * batch / seconds

    step(prompt)
    run(2)
    return run


if __name__ == "__main__":
    answer_runs(prepare)
