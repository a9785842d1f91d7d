"""One training step (forward, backward, clipping, AdamW) on random rows, against the machine's matrix products."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from persimmon.accounting import training_flops_per_token
from persimmon.bench.ceiling import Ceiling
from persimmon.bench.decode import against_fields
from persimmon.bench.peers import Peer
from persimmon.bench.row import Row, finished, peak_rss_bytes
from persimmon.bench.timing import Stopwatch, alternate, percent_of, repeat
from persimmon.config import ModelConfig
from persimmon.model import PersimmonModel
from persimmon.train.fused import in_use
from persimmon.train.loop import Batch, LoopRecipe, Trainer
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.parallel import World

LEARNING_RATE = 1e-4
"""Small: random targets are not learned, and a loss that does not jump passes the loop's guard."""


@dataclass(frozen=True)
class TrainWork:
    """What a step trains on."""

    config: ModelConfig
    length: int
    """Tokens of a row."""
    rows: int
    dtype: str = "float32"
    documents: int = 0
    """Tokens of each document in a row; 0: a row is one document."""
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length


class RandomRows:
    """A source of random rows; a step's rows follow from seed and step."""

    def __init__(self, work: TrainWork) -> None:
        self._work = work

    def rows(self, step: int) -> int:
        """Rows of a step."""
        return self._work.rows

    def row_length(self, step: int) -> int:
        """Tokens of a row."""
        return self._work.length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Some of the step's rows."""
        work = self._work
        generator = torch.Generator().manual_seed(work.seed + step)
        ids = torch.randint(work.config.vocab_size, (work.rows, work.length + 1), generator=generator)[list(rows)]
        total = len(rows) * work.length
        size = work.documents or work.length
        starts = [row * work.length + offset for row in range(len(rows)) for offset in range(0, work.length, size)]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), [*starts, total])


class Training:
    """A model in training; every run is one step."""

    def __init__(self, work: TrainWork, steps: int) -> None:
        """`steps`: most steps that will be run, besides one to warm up."""
        self._work = work
        torch.set_flush_denormal(True)  # as `pretrain` does
        model = PersimmonModel(work.config)
        model.initialize(torch.Generator().manual_seed(work.seed))
        recipe = LoopRecipe(
            optimizer=OptimizerRecipe(matrices="adamw", matrix_lr=LEARNING_RATE, vector_lr=LEARNING_RATE),
            dtype=work.dtype,
        )
        self._directory = tempfile.TemporaryDirectory()
        self._trainer = Trainer(model, RandomRows(work), steps + 1, recipe, Path(self._directory.name), World())
        self._trainer.train_step()
        self.engine = "cpu" if in_use(model) else "reference"
        """Whether the training kernels of the CPU engine run, or PyTorch alone."""

    def run(self) -> float:
        """Tokens per second of one step."""
        with Stopwatch() as watch:
            self._trainer.train_step()
        return self._work.tokens / watch.seconds

    def close(self) -> None:
        """Remove the run's directory, and leave the process as it was."""
        torch.set_flush_denormal(False)
        self._directory.cleanup()


def train_row(work: TrainWork, threads: int, runs: int, ceiling: Ceiling, peer: Peer | None) -> Row:
    """Measure, alone or in turns with a peer, and put the figures together."""
    torch.set_num_threads(threads)
    training = Training(work, runs)
    try:
        if peer is None:
            ours, against = repeat(training.run, runs), {}
        else:
            pairs = alternate(training.run, peer.run, runs)
            ours, against = pairs.ours, against_fields(peer, pairs.peer, pairs.ratios)
    finally:
        training.close()
    peak = peak_rss_bytes()
    theirs = against.get("peer", {}).get("peak_rss_bytes")
    limit = ceiling.again()
    flops = training_flops_per_token(work.config, work.documents or work.length)
    products = {limit.method: limit.value, **limit.others}
    most = products.get(work.dtype, limit.value) * 1e9 / flops
    return finished(
        {
            "bench": "train",
            "model": shape_name(work.config),
            "engine": training.engine,
            "format": work.dtype,
            "threads": threads,
            "context": work.length,
            "batch": work.rows,
            "documents": work.documents,
            "tokens_per_second": ours.median,
            "runs": list(ours.values),
            "bytes_per_token": None,
            "bytes_per_token_dense": None,
            "bandwidth_gb_s": None,
            "flops_per_token": flops,
            "gemm_gflops": products,
            "ceiling_tokens_per_second": most,
            "percent_of_ceiling": percent_of(ours.median, most),
            "peak_rss_bytes": peak,
            **against,
            **({"peak_rss_ratio": peak / theirs} if theirs else {}),
        }
    )


def shape_name(config: ModelConfig) -> str:
    """`256x6, MLP 1024, vocabulary 8192`."""
    return f"{config.hidden_size}x{config.num_layers}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}"
