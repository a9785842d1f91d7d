"""From one form of checkpoint to a model directory, in bounded memory, and the proof that nothing changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persimmon.checkpoints.adept import AdeptCheckpoint
from persimmon.checkpoints.directory import ModelDirectory, copy_card, read_generation, write_directory
from persimmon.checkpoints.releases import CARD_FILE, Release, write_card
from persimmon.checkpoints.shards import DEFAULT_SHARD_BYTES, ProgressReport, no_progress
from persimmon.checkpoints.staging import check_apart
from persimmon.checkpoints.tensors import TensorData, num_bytes
from persimmon.checkpoints.vocabulary import copy_map
from persimmon.errors import NotFoundError
from persimmon.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


def write_release(
    checkpoint: AdeptCheckpoint,
    target: Path,
    *,
    release: Release | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> None:
    """Write an opened release of Adept's as a model directory, with a card that states the licence if it is known."""
    write_directory(
        target, checkpoint.config, checkpoint.tensors, checkpoint.tokenizer,
        extra=(lambda partial: write_card(release, partial)) if release else None,
        max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip


def write_copy(
    source: ModelDirectory,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    changed: Mapping[str, TensorData] | None = None,
    card_note: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> tuple[dict[str, TensorData], list[str]]:
    """Write a model directory afresh, in our layout: the tensors as written, by our names, and notes for a person.

    The end-of-text ids come from the vocabulary, because configurations on the hub have wrong ones. `changed`: tensors
    that take the place of the source's. `card_note`: a paragraph for the end of the model card.
    """
    check_apart(source.path, target)
    notes = []
    tokenizer, config = _tokenizer(source.path), source.config
    if tokenizer is None:
        notes.append(f"{source.path} has no tokenizer: the copy has none either")
    elif (config.bos_token_id, config.eos_token_id) != (tokenizer.bos_id, tokenizer.eos_id):
        notes.append(f"bos and eos are {tokenizer.eos_id} in the vocabulary, not {config.eos_token_id}: corrected")
        config = config.replace(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if config.hidden_dropout:
        notes.append(f"hidden_dropout {config.hidden_dropout} is metadata and never applied; the copy says 0")

    def extra(partial: Path) -> None:
        copy_card(source.path, partial)
        copy_map(source.path, partial, with_rows=dtype is None)
        if card_note is not None:
            with (partial / CARD_FILE).open("a") as card:
                card.write(f"\n{card_note}\n")

    tensors = _as_type({**source.tensors, **(changed or {})}, dtype)
    write_directory(
        target, config, tensors, tokenizer, generation=read_generation(source.path), extra=extra,
        max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip
    return tensors, notes


def _tokenizer(directory: Path) -> Tokenizer | None:
    try:
        return Tokenizer.load(directory)
    except NotFoundError:
        return None


def _as_type(tensors: Mapping[str, TensorData], dtype: torch.dtype | None) -> dict[str, TensorData]:
    if dtype is None:
        return dict(tensors)
    from persimmon.checkpoints.hub import converted

    return {name: converted(tensor, dtype) for name, tensor in tensors.items()}


# -- comparison ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What two sets of tensors have in common."""

    equal: int
    """Tensors that are the same bit for bit."""
    differing: dict[str, str]
    """The others, and how they differ."""


def compare(
    first: Mapping[str, TensorData], second: Mapping[str, TensorData], progress: ProgressReport = no_progress
) -> Comparison:
    """Compare two models tensor by tensor, streaming both."""
    differing: dict[str, str] = {}
    total, done = sum(map(num_bytes, first.values())), 0
    for name in [*first, *(name for name in second if name not in first)]:
        one, other = first.get(name), second.get(name)
        if one is None or other is None:
            differing[name] = "only in one of them"
            continue
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            differing[name] = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        elif _digest(one) != _digest(other):
            differing[name] = "different values"
        done += num_bytes(one)
        progress(done, total)
    return Comparison(len(first.keys() | second.keys()) - len(differing), differing)


def _digest(tensor: TensorData) -> bytes:
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.digest()
