"""Peer of `persimmon bench train`: forward, backward, clipping and AdamW on random rows of the same shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PersimmonConfig, PersimmonForCausalLM
from transformers_model import answer_runs

_LEARNING_RATE = 1e-4


def prepare(settings: dict[str, Any]) -> Callable[[], float]:
    """Build in float32 (bfloat16: under autocast, as we do), and run one step to warm up."""
    torch.set_num_threads(int(settings["threads"]))
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    config = PersimmonConfig(**{**settings["config"], "use_cache": False})
    config._attn_implementation = "sdpa"
    model = PersimmonForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)
    rows, length = settings["batch"], settings["context"]

    def run() -> float:
        ids = torch.randint(0, config.vocab_size, (rows, length))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return rows * length / (time.perf_counter() - started)

    run()
    return run


if __name__ == "__main__":
    answer_runs(prepare)
