"""`persimmon pretrain RECIPE`: a Persimmon from scratch on prepared token stores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from persimmon.checkpoints import hub
from persimmon.config import ModelConfig, preset
from persimmon.data.documents import read_documents
from persimmon.data.packing import PackedRows, Row
from persimmon.data.tokens import TokenStore, check_vocabulary, read_manifest
from persimmon.errors import ConfigError, NotFoundError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.evaluate import encode_text, encoded_bits_per_byte
from persimmon.train.loop import Batch, LoopRecipe, Trainer
from persimmon.train.parallel import World, run_processes

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class PhaseRecipe:
    """A stretch of the run with one row length and one batch size."""

    share: float
    """Share of the run's tokens."""
    row_length: int
    batch_tokens: int
    """Tokens per optimizer step, over all processes."""

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.batch_tokens % self.row_length:
            raise ConfigError(f"batch_tokens {self.batch_tokens} must be a multiple of row_length {self.row_length}")


@dataclass(frozen=True)
class ModelRecipe:
    """A preset and the spread of its initial weights (see PersimmonModel.initialize)."""

    preset: str = "mini"
    std: float = 0.02
    output_std: float | None = None
    head_std: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that differ from the preset."""


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything about a pretraining run."""

    data: str
    output: str
    tokens: int
    phases: tuple[PhaseRecipe, ...]
    model: ModelRecipe = field(default_factory=ModelRecipe)
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    whole_documents: bool = False
    """Cut no document that fits into a row; what stays free in a row is padding (data/packing.py)."""
    seed: int = 0
    processes: int = 1
    threads: int = 0
    """Threads of each process; 0: PyTorch's choice."""

    def __post_init__(self) -> None:
        if abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ConfigError(f"the shares of the phases add up to {sum(p.share for p in self.phases):g}, not 1")


@dataclass(frozen=True)
class _Phase:
    """A phase with its place in the run."""

    first_step: int
    num_steps: int
    row_length: int
    rows_per_step: int
    first_row: int
    """Rows of this length that earlier phases took."""


def plan_phases(recipe: PretrainRecipe) -> list[_Phase]:
    """The steps of each phase; phases of equal row length go on in the same stream of rows."""
    phases: list[_Phase] = []
    step, used = 0, dict.fromkeys((phase.row_length for phase in recipe.phases), 0)
    for phase in recipe.phases:
        steps = max(1, round(recipe.tokens * phase.share / phase.batch_tokens))
        rows = phase.batch_tokens // phase.row_length
        phases.append(_Phase(step, steps, phase.row_length, rows, used[phase.row_length]))
        step += steps
        used[phase.row_length] += steps * rows
    return phases


class PackedSource:
    """The packed rows of every step of a pretraining run."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        directory = Path(recipe.data)
        facts = read_manifest(directory)["sources"]
        stores = {name: TokenStore(directory, name) for name in facts}
        weights = {name: entry["weight"] for name, entry in facts.items()}
        self._phases = plan_phases(recipe)
        self._rows = {
            length: PackedRows(stores, weights, length, recipe.seed, whole=recipe.whole_documents)
            for length in {phase.row_length for phase in self._phases}
        }
        self.num_steps = sum(phase.num_steps for phase in self._phases)

    def _phase(self, step: int) -> _Phase:
        return next(p for p in reversed(self._phases) if p.first_step <= step)

    def rows(self, step: int) -> int:
        """Rows of a step."""
        return self._phase(step).rows_per_step

    def row_length(self, step: int) -> int:
        """Tokens per row of a step."""
        return self._phase(step).row_length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Some of the step's rows as one batch."""
        phase = self._phase(step)
        first = phase.first_row + (step - phase.first_step) * phase.rows_per_step
        return stack_rows([self._rows[phase.row_length][first + row] for row in rows])


def stack_rows(rows: Sequence[Row]) -> Batch:
    """Rows of equal length as tensors, their document offsets laid end to end."""
    length = len(rows[0].token_ids)
    documents = [0]
    for index, row in enumerate(rows):
        documents += [index * length + offset for offset in row.boundaries[1:]]
    ids = torch.stack([torch.from_numpy(row.token_ids) for row in rows])
    targets = torch.stack([torch.from_numpy(row.targets) for row in rows])
    return Batch(ids, targets, documents)


def set_up_process(threads: int) -> None:
    """Threads of this process, and no denormals: they cost more than they say."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Undo `set_up_process` at the end: a run with one process is a guest in the caller's."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def build_model(recipe: ModelRecipe, vocab_size: int, end_of_text: int, seed: int) -> PersimmonModel:
    """A freshly initialised model that fits the vocabulary."""
    sizes = {"vocab_size": vocab_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config: ModelConfig = preset(recipe.preset, **{**sizes, **recipe.changes})
    model = PersimmonModel(config)
    model.initialize(
        torch.Generator().manual_seed(seed),
        std=recipe.std, output_std=recipe.output_std, head_std=recipe.head_std,
    )  # fmt: skip
    return model


def held_out_evaluation(data: Path, tokenizer: Tokenizer) -> Callable[[PersimmonModel], dict[str, float]]:
    """Quick bits per byte of each source's held-out documents: the first 4,096 tokens of up to 24 of them."""
    texts = {
        file.name.split(".")[1]: [
            encode_text(tokenizer, document.text, max_tokens=4096) for document in islice(read_documents(file), 24)
        ]
        for file in sorted(data.glob("held_out.*.jsonl.gz"))
    }

    def evaluate(model: PersimmonModel) -> dict[str, float]:
        return {
            name: round(encoded_bits_per_byte(model, sample, window=2048), 4)
            for name, sample in texts.items()
            if sample
        }

    return evaluate


def sample_text(tokenizer: Tokenizer, tokens: int = 32) -> Callable[[PersimmonModel], str]:
    """What the model writes by itself, always its likeliest piece: a line for the log, not a measure."""

    @torch.no_grad()
    def sample(model: PersimmonModel) -> str:
        device = next(model.parameters()).device
        ids = [tokenizer.eos_id]
        for _ in range(tokens):
            hidden = model.features(torch.tensor([ids], device=device))
            ids.append(int(model.lm_head(hidden)[0, -1].argmax()))
        return tokenizer.decode(ids[1:])

    return sample


def export(trainer: Trainer, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the trained model as a hub directory (every process takes part)."""
    model = trainer.whole_model()
    if trainer.world.is_main:
        hub.save_model(model, tokenizer, directory, dtype=torch.bfloat16)


def _run(world: World, recipe: PretrainRecipe, resume: bool, report: Report) -> None:
    set_up_process(recipe.threads)
    data, output = Path(recipe.data), Path(recipe.output)
    if not data.is_dir():
        raise NotFoundError(f"no prepared data at {data}; `persimmon data prepare` makes it")
    tokenizer = Tokenizer.load(data)
    check_vocabulary(data, tokenizer.serialized)
    source = PackedSource(recipe)
    model = build_model(recipe.model, tokenizer.vocab_size, tokenizer.eos_id, recipe.seed)
    evaluate = held_out_evaluation(data, tokenizer)
    trainer = Trainer(
        model, source, source.num_steps, recipe.loop, output, world,
        evaluate, report, sample_text(tokenizer),
    )  # fmt: skip
    if resume:
        trainer.resume()
    trainer.run()
    export(trainer, tokenizer, output / "model")


def refuse_overwriting(output: str, resume: bool) -> None:
    """Raise ConfigError when `output` already holds a run that is not to be resumed."""
    checkpoints = Path(output) / "checkpoints"
    if not resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ConfigError(f"{output} already holds a run; pass --resume to go on with it")


def pretrain(recipe: PretrainRecipe, *, resume: bool, report: Report) -> None:
    """Run (or go on with) a recipe: checkpoints, metrics and the finished `model` land in its output directory.

    `report` gets every step's metrics in the main process and must be a module-level function.
    """
    refuse_overwriting(recipe.output, resume)
    os.environ.setdefault("OMP_NUM_THREADS", str(recipe.threads or os.cpu_count() or 1))
    with process_restored():
        run_processes(recipe.processes, _run, recipe, resume, report)
