"""`persimmon tokenizer train`: a vocabulary from files or a data recipe's mix, and how it spells each source."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from persimmon.data.documents import read_documents
from persimmon.data.executors import execute
from persimmon.data.prepare import plan_job
from persimmon.data.recipe import DataRecipe
from persimmon.data.stages import HELD_OUT, STAGES, kept_texts
from persimmon.data.vocabulary import sample_texts, train_vocabulary
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.tokenizer import Tokenizer

Report = Callable[[str], None]


@dataclass(frozen=True)
class Compression:
    """How a vocabulary spells some text."""

    documents: int
    """Documents, or pieces of them in a sample."""
    bytes: int
    tokens: int
    bytes_per_token: float
    single_byte_share: float
    """Share of the tokens that spell one byte of a character without a piece."""


@dataclass(frozen=True)
class VocabularyReport:
    """What a trained vocabulary does on the text that it was trained on, and on text that was held out."""

    vocab_size: int
    documents: int
    characters: int
    """Characters of the sample."""
    bytes_per_token: float
    """UTF-8 bytes of the sample by its tokens."""
    single_byte_share: float
    pieces_used: int
    """Pieces that occur in the sample."""
    sample: dict[str, Compression]
    """By source."""
    held_out: dict[str, Compression]
    """By source; empty where nothing was held out."""
    seconds: float


def train_from_files(
    files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *,
    vocab_size: int, characters: int, seed: int = 0, threads: int = 2, report: Report = lambda line: None,
) -> VocabularyReport:  # fmt: skip
    """Train on a sample of all documents of `files` and write the tokenizer's files to `output`.

    `report` gets a line before each step. Raises NotFoundError, DataError (file and line), InputError.
    """
    for name, value in (("vocab_size", vocab_size), ("characters", characters), ("threads", threads)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"no documents at {path}")
    start = time.monotonic()
    texts = lambda: (document.text for path in paths for document in read_documents(path))  # noqa: E731
    sizes = [len(text) for text in texts()]
    report(f"documents: {len(sizes):,}, characters: {sum(sizes):,}")
    sample = sample_texts({"documents": texts}, {"documents": 1.0}, characters, seed)
    return _train(sample, {}, Path(output), vocab_size, threads, len(sizes), start, report)


def train_from_recipe(
    recipe: DataRecipe, output: str | os.PathLike[str], *, threads: int = 2, report: Report = lambda line: None
) -> VocabularyReport:
    """Train on the training documents of a data recipe, sampled by its weights: filtered, without duplicates.

    Gives the vocabulary that `data prepare` trains for the recipe. Held-out documents are measured too.
    """
    if recipe.executor.kind == "slurm":
        raise InputError("tokenizer train does not wait for a queue: use executor.kind local, ray or in_process")
    start = time.monotonic()
    # What is unfinished stays beside the result until it is there, so that an interrupted run goes on.
    job = plan_job(dataclasses.replace(recipe, output=str(output)))
    execute(job, STAGES[:3], lambda stage, done: None if done else report(f"{stage} ..."))
    total = sum(recipe.weights.values())
    texts = {name: partial(kept_texts, job, name) for name in recipe.sources}
    shares = {name: weight / total for name, weight in recipe.weights.items()}
    sample = sample_texts(texts, shares, recipe.vocabulary.characters, recipe.seed)
    documents = sum(1 for name in recipe.sources for _ in kept_texts(job, name))
    held = {name: kept_texts(job, name, HELD_OUT) for name in recipe.sources}
    size = recipe.vocabulary.size
    result = _train(sample, held, Path(output), size, threads, documents, start, report)
    shutil.rmtree(job.work.parent, ignore_errors=True)
    return result


def _train(
    sample: Mapping[str, list[str]], held_out: Mapping[str, Iterable[str]], output: Path,
    vocab_size: int, threads: int, documents: int, start: float, report: Report,
) -> VocabularyReport:  # fmt: skip
    texts = list(chain.from_iterable(sample.values()))
    size = sum(map(len, texts))
    report(f"training {vocab_size:,} pieces on {size:,} characters")
    tokenizer = Tokenizer(train_vocabulary(texts, vocab_size, threads=threads))
    tokenizer.save(output)
    used: set[int] = set()
    on_sample = {name: compression(tokenizer, items, used) for name, items in sample.items() if items}
    total = sum(entry.tokens for entry in on_sample.values())
    if not total:
        raise DataError("no text to train a vocabulary on")
    return VocabularyReport(
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        characters=size,
        bytes_per_token=sum(entry.bytes for entry in on_sample.values()) / total,
        single_byte_share=sum(entry.single_byte_share * entry.tokens for entry in on_sample.values()) / total,
        pieces_used=len(used),
        sample=on_sample,
        held_out={name: entry for name, items in held_out.items() if (entry := compression(tokenizer, items)).tokens},
        seconds=time.monotonic() - start,
    )


def compression(tokenizer: Tokenizer, texts: Iterable[str], used: set[int] | None = None) -> Compression:
    """Measure `texts`; the ids that occur are added to `used`."""
    documents = size = tokens = spelled = 0
    for text in texts:
        ids = tokenizer.encode(text)
        documents, size, tokens = documents + 1, size + len(text.encode()), tokens + len(ids)
        kinds = set(ids)
        single = {token_id for token_id in kinds if tokenizer.piece(token_id).startswith("<0x")}
        spelled += sum(1 for token_id in ids if token_id in single) if single else 0
        if used is not None:
            used |= kinds
    return Compression(documents, size, tokens, size / max(1, tokens), spelled / max(1, tokens))
