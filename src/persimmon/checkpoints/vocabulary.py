"""Dropping the rows of embedding and head that no text uses, and putting them back.

Unused are the rows behind the tokenizer's last piece and pieces that the vocabulary itself marks as unused; a pattern
can name more. What stays is copied bit for bit, so the logits of the kept ids do not change. Ids close ranks: the
directory gets a tokenizer with the new ids, `vocabulary_map.json` with the translation and, unless they are discarded,
the dropped rows and the old vocabulary in `vocabulary_dropped.safetensors`, from which `restore` makes the original
again.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.checkpoints import shards
from persimmon.checkpoints.directory import (
    ModelDirectory,
    check_tokenizer,
    copy_card,
    open_directory,
    read_generation,
    write_directory,
)
from persimmon.checkpoints.shards import DEFAULT_SHARD_BYTES, ProgressReport, no_progress
from persimmon.checkpoints.staging import check_apart
from persimmon.checkpoints.tensors import ByteTensor, Concatenation, StoredTensor, TensorData, describe
from persimmon.errors import CheckpointError, InputError, NotFoundError
from persimmon.tokenizer import Tokenizer
from persimmon.tokenizer_files.model_proto import PieceType, read_model

MAP_FILE = "vocabulary_map.json"
DROPPED_FILE = "vocabulary_dropped.safetensors"

_ROWED = ("embed_tokens.weight", "lm_head.weight")  # the tensors with one row per id
_OLD_VOCABULARY = "tokenizer.model"

Range = tuple[int, int]
"""First id and the one behind the last."""


@dataclass(frozen=True)
class VocabularyMap:
    """Which ids of the original vocabulary are kept; their order stays."""

    original_size: int
    kept: tuple[Range, ...]
    """Ascending, neither empty nor touching."""

    def __post_init__(self) -> None:
        inner = list(itertools.chain.from_iterable(self.kept))
        ascending = all(a < b for a, b in itertools.pairwise(inner))
        if not inner or not ascending or inner[0] < 0 or inner[-1] > self.original_size:
            raise InputError(f"the kept ids must be ascending ranges inside 0 to {self.original_size}")

    @functools.cached_property
    def _new_starts(self) -> list[int]:
        """New id of the first id of every range; last, the new size."""
        return list(itertools.accumulate((end - first for first, end in self.kept), initial=0))

    @property
    def size(self) -> int:
        """Rows that are kept."""
        return self._new_starts[-1]

    @property
    def dropped(self) -> tuple[Range, ...]:
        """The other ranges."""
        edges = [0, *itertools.chain.from_iterable(self.kept), self.original_size]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    def new_id(self, original: int) -> int | None:
        """The new id of an original one; None when it was dropped."""
        index = bisect.bisect_right(self.kept, (original, self.original_size + 1)) - 1
        if index < 0 or not self.kept[index][0] <= original < self.kept[index][1]:
            return None
        return self._new_starts[index] + original - self.kept[index][0]

    def original_id(self, new: int) -> int:
        """The original id of a new one."""
        if not 0 <= new < self.size:
            raise InputError(f"id {new} is outside the pruned vocabulary of {self.size}")
        index = bisect.bisect_right(self._new_starts, new) - 1
        return self.kept[index][0] + new - self._new_starts[index]

    @classmethod
    def keeping(cls, ids: Iterable[int], original_size: int) -> VocabularyMap:
        """The map that keeps the given ascending ids."""
        ranges: list[Range] = []
        for index in ids:
            if ranges and ranges[-1][1] == index:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
        return cls(original_size, tuple(ranges))

    @classmethod
    def load(cls, directory: Path) -> VocabularyMap:
        """Read `vocabulary_map.json` of a pruned directory."""
        file = directory / MAP_FILE
        if not file.is_file():
            raise NotFoundError(f"{directory} was not pruned: it has no {MAP_FILE}")
        document = shards.read_json(file)
        try:
            ranges = tuple((int(first), int(end)) for first, end in document["kept"])
            return cls(int(document["original_vocab_size"]), ranges)
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: not a vocabulary map: {error}") from None

    def save(self, directory: Path) -> None:
        """Write `vocabulary_map.json`."""
        document = {"original_vocab_size": self.original_size, "vocab_size": self.size, "kept": self.kept}
        (directory / MAP_FILE).write_text(json.dumps(document) + "\n")


def find_unused(tokenizer: Tokenizer, vocab_size: int, pattern: str | None = None) -> VocabularyMap:
    """The map that drops unused rows; `pattern` is a regular expression for whole pieces that are unused as well.

    End of text, the unknown piece, and the pieces that spell bytes always stay.
    """
    try:
        named = re.compile(pattern) if pattern else None
    except re.error as error:
        raise InputError(f"not a regular expression: {pattern!r}: {error}") from None
    pieces = read_model(tokenizer.serialized).pieces
    text = (PieceType.NORMAL, PieceType.USER_DEFINED)

    def is_used(index: int, piece: Any) -> bool:
        if index == tokenizer.eos_id:
            return True
        named_unused = named is not None and piece.type in text and named.fullmatch(piece.piece)
        return piece.type != PieceType.UNUSED and not named_unused

    kept = VocabularyMap.keeping((i for i, piece in enumerate(pieces) if is_used(i, piece)), vocab_size)
    if kept.size == vocab_size:
        raise InputError(f"nothing to drop: all {vocab_size} rows belong to pieces in use")
    return kept


def prune(
    source: Path,
    target: Path,
    *,
    unused: str | None = None,
    keep_dropped: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> VocabularyMap:
    """Write `source` without its unused rows to `target`; `keep_dropped` false makes that final.

    Raises InputError when there is nothing to drop or it was done before.
    """
    check_apart(source, target)
    if (source / MAP_FILE).is_file():
        raise InputError(f"{source} is pruned already; restore it first")
    opened, tokenizer = open_directory(source), Tokenizer.load(source)
    check_tokenizer(tokenizer, opened.config)
    mapping = find_unused(tokenizer, opened.config.vocab_size, unused)
    pruned = _pruned_tokenizer(tokenizer, mapping)
    config = opened.config.replace(vocab_size=mapping.size, bos_token_id=pruned.bos_id, eos_token_id=pruned.eos_id)

    def extra(partial: Path) -> None:
        copy_card(source, partial)
        mapping.save(partial)
        if keep_dropped:
            dropped = [_select(opened.tensors[name], mapping.dropped) for name in _ROWED]
            shards.write_file(partial / DROPPED_FILE, [*dropped, ByteTensor(_OLD_VOCABULARY, tokenizer.serialized)])

    tensors: dict[str, TensorData] = dict(opened.tensors)
    tensors |= {name: _select(opened.tensors[name], mapping.kept) for name in _ROWED}
    write_directory(
        target, config, tensors, pruned, generation=read_generation(source), extra=extra,
        max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip
    return mapping


def restore(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> VocabularyMap:
    """Write the pruned directory `source` with all its original rows to `target`; the opposite of `prune`.

    Kept rows come from `source`, so training after pruning is kept. NotFoundError when the dropped rows were discarded.
    """
    check_apart(source, target)
    mapping, opened = VocabularyMap.load(source), open_directory(source)
    if opened.config.vocab_size != mapping.size:
        raise CheckpointError(
            f"{source / MAP_FILE}: it keeps {mapping.size} ids, the model has {opened.config.vocab_size}"
        )
    dropped, tokenizer = _read_dropped(source / DROPPED_FILE, opened, mapping)
    config = opened.config.replace(
        vocab_size=mapping.original_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    tensors: dict[str, TensorData] = dict(opened.tensors)
    tensors |= {name: _interleave(opened.tensors[name], dropped[name], mapping) for name in _ROWED}
    write_directory(
        target, config, tensors, tokenizer, generation=read_generation(source),
        extra=lambda partial: copy_card(source, partial), max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip
    return mapping


def copy_map(source: Path, target: Path, *, with_rows: bool) -> None:
    """Carry the traces of pruning over to a copy of a directory, if it has any; `with_rows` the dropped rows too."""
    for name in [MAP_FILE, *([DROPPED_FILE] if with_rows else [])]:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _select(tensor: StoredTensor, ranges: Sequence[Range]) -> Concatenation:
    return Concatenation(tensor.name, tuple(tensor.rows(first, end) for first, end in ranges))


def _interleave(kept: StoredTensor, dropped: StoredTensor, mapping: VocabularyMap) -> Concatenation:
    """Both tensors' rows at their original places."""
    places = [(span, kept) for span in mapping.kept] + [(span, dropped) for span in mapping.dropped]
    taken = {id(kept): 0, id(dropped): 0}
    parts = []
    for (first, end), tensor in sorted(places, key=lambda place: place[0]):
        start = taken[id(tensor)]
        parts.append(tensor.rows(start, start + end - first))
        taken[id(tensor)] = start + end - first
    return Concatenation(kept.name, tuple(parts))


def _read_dropped(
    file: Path, opened: ModelDirectory, mapping: VocabularyMap
) -> tuple[dict[str, StoredTensor], Tokenizer]:
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist: the dropped rows were discarded, so they cannot be put back")
    found = {tensor.name: tensor for tensor in shards.read_file(file)}
    rows = mapping.original_size - mapping.size
    for name in _ROWED:
        expected, shape = opened.tensors[name], (rows, opened.config.hidden_size)
        tensor = found.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != (expected.dtype, shape):
            shown = describe(tensor.dtype, tensor.shape) if tensor else "nothing"
            raise CheckpointError(f"{file}: {name}: {describe(expected.dtype, shape)} expected, {shown} found")
    if _OLD_VOCABULARY not in found:
        raise CheckpointError(f"{file}: {_OLD_VOCABULARY} is missing")
    return found, Tokenizer(b"".join(bytes(chunk) for chunk in found[_OLD_VOCABULARY].chunks()))


def _pruned_tokenizer(tokenizer: Tokenizer, mapping: VocabularyMap) -> Tokenizer:
    """The vocabulary without the dropped pieces; texts get the same pieces under their new ids."""
    model = read_model(tokenizer.serialized)
    used = [piece for index, piece in enumerate(model.pieces) if mapping.new_id(index) is not None]
    kept = [type(piece).FromString(piece.SerializeToString()) for piece in used]
    del model.pieces[:]
    model.pieces.extend(kept)
    spec = model.trainer_spec
    spec.vocab_size = len(kept)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        new = mapping.new_id(getattr(spec, name)) if getattr(spec, name) >= 0 else None
        setattr(spec, name, -1 if new is None else new)
    return Tokenizer(model.SerializeToString(deterministic=True))
