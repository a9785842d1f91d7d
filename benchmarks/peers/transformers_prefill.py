"""Peer of `persimmon bench prefill`: one pass over a prompt, logits of its last token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers_model import answer_runs, build


def prepare(settings: dict[str, Any]) -> Callable[[], float]:
    """Load, and read a few tokens to warm up."""
    model = build(settings)
    prompt = torch.randint(0, model.config.vocab_size, (1, settings["length"]))

    @torch.inference_mode()
    def read(ids: torch.Tensor) -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    def run() -> float:
        started = time.perf_counter()
        read(prompt)
        return prompt.shape[1] / (time.perf_counter() - started)

    read(prompt[:, :16])
    return run


if __name__ == "__main__":
    answer_runs(prepare)
