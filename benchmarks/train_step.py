"""Training tokens per second of this project and of transformers on the same shape and work, in alternation.

python benchmarks/train_step.py --seq 1024 --batch 8 --dtype float32

Forward, backward, clipping and AdamW on random ids, one process; the peer has its own loss and torch's AdamW. The
machine may be shared: read the ratio, not the rates. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from persimmon.config import ModelConfig, preset
from persimmon.model import PersimmonModel
from persimmon.train.loop import Batch, LoopRecipe, Trainer
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.parallel import World


class RandomIds:
    """Rows of one document each."""

    def __init__(self, rows: int, length: int, vocab_size: int) -> None:
        self._rows, self._length, self._vocab = rows, length, vocab_size

    def rows(self, step: int) -> int:
        return self._rows

    def row_length(self, step: int) -> int:
        return self._length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self._vocab, (len(rows), self._length + 1), generator=generator)
        offsets = [row * self._length for row in range(len(rows) + 1)]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), offsets)


def ours(config: ModelConfig, args: argparse.Namespace, directory: Path) -> Callable[[], object]:
    model = PersimmonModel(config)
    model.initialize(torch.Generator().manual_seed(0))
    recipe = LoopRecipe(
        dtype=args.dtype, micro_tokens=args.micro_tokens, optimizer=OptimizerRecipe(matrices=args.matrices)
    )
    source = RandomIds(args.batch, args.seq, config.vocab_size)
    return Trainer(model, source, 1000, recipe, directory, World()).train_step


def peer(config: ModelConfig, args: argparse.Namespace) -> Callable[[], object]:
    from transformers import PersimmonConfig, PersimmonForCausalLM

    settings = config.to_hub("float32")
    model = PersimmonForCausalLM(PersimmonConfig(**settings, attn_implementation="sdpa")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        ids = torch.randint(config.vocab_size, (args.batch, args.seq))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--matrices", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens per forward pass of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    config = preset("mini", num_heads=8)
    seconds: dict[str, list[float]] = {"persimmon": [], "transformers": []}
    with tempfile.TemporaryDirectory() as directory:
        steps = {"persimmon": ours(config, args, Path(directory)), "transformers": peer(config, args)}
        for turn in range(args.steps + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
    rates = {name: args.seq * args.batch / statistics.median(times) for name, times in seconds.items()}
    ratio = rates["persimmon"] / rates["transformers"]
    print(
        f"persimmon {rates['persimmon']:,.0f} tok/s, transformers {rates['transformers']:,.0f} tok/s, ratio {ratio:.2f}"
    )
    print(json.dumps({"bench": "train-step", **vars(args), "tokens_per_second": rates, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
