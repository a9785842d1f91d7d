"""transformers' Persimmon for the peers: weights of a directory, or random ones of a shape too large to be written."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PersimmonConfig, PersimmonForCausalLM

_DRAWN = 1 << 22  # random values that are repeated: timing does not depend on them


def build(settings: dict[str, Any]) -> PersimmonForCausalLM:
    """The model that the settings name: `directory`, or `config` with random weights; `dtype`, `threads`."""
    torch.set_num_threads(int(settings["threads"]))
    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])
    if settings.get("directory"):
        model = PersimmonForCausalLM.from_pretrained(settings["directory"], dtype=dtype)
    else:
        model = random_model(PersimmonConfig(**settings["config"]), dtype)
    return model.eval().requires_grad_(False)


def random_model(config: PersimmonConfig, dtype: torch.dtype) -> PersimmonForCausalLM:
    """Random weights drawn in the final type, so that the peak is the model itself."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = PersimmonForCausalLM(config)
    rotary = type(model.model.rotary_emb)
    model = model.to(dtype).to_empty(device="cpu")
    model.model.rotary_emb = rotary(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
                continue
            flat = parameter.view(-1)
            drawn = torch.randn(min(flat.numel(), _DRAWN)).mul_(0.02).to(dtype)
            for start in range(0, flat.numel(), drawn.numel()):
                part = flat[start : start + drawn.numel()]
                part.copy_(drawn[: part.numel()])
    return model


def peak_rss_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def versions() -> dict[str, str]:
    """What a row keeps about the peer."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def answer_runs(prepare: Callable[[dict[str, Any]], Callable[[], float]]) -> None:
    """The peers' protocol: settings as the argument, `ready` once, then one result for every line of standard input."""
    settings = json.loads(sys.argv[1])
    run = prepare(settings)
    print(json.dumps({"ready": {"versions": versions()}}), flush=True)
    for _ in sys.stdin:
        rate = run()
        print(json.dumps({"tokens_per_second": rate, "peak_rss_bytes": peak_rss_bytes()}), flush=True)
