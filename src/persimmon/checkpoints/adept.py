"""Adept's own release of Persimmon-8B: two tars, read as data in bounded memory. No torch, and none of their code runs.

A tar holds `latest_checkpointed_iteration.txt`, `iter_NNNNNNN/mp_rank_00/model_optim_rng.pt`, `adept_vocab.model` and a
`.vocab` nobody needs. The `.pt` is a pickled training state: `args` (argparse namespace), `iteration`, `model` (nested
dictionaries of tensors), random states (adept-inference `megatron/checkpointing.py`). Only places of tensors are taken
from it, and the arguments, which are held against the tensors' shapes.

Also read: the unpacked tar, and a `.pt` on its own with the vocabulary near it.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from persimmon.checkpoints.adept_config import config_from_args
from persimmon.checkpoints.directory import check_tensors
from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.checkpoints.tensors import CHUNK_BYTES, StoredTensor
from persimmon.checkpoints.torch_files import open_torch_file
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, NotFoundError
from persimmon.tokenizer import Tokenizer

_TRACKER = "latest_checkpointed_iteration.txt"
_VOCABULARY = "adept_vocab.model"
_MAX_SMALL_FILE = 64 << 20  # the vocabulary takes about 5 MB


@dataclass(frozen=True)
class AdeptCheckpoint:
    """An opened release."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    """By our names, in the model's order."""
    tokenizer: Tokenizer
    notes: tuple[str, ...]
    """What a person should know: evidence found, settings that are ignored."""


@dataclass(frozen=True)
class _Member:
    """A file of the release: on its own, or inside the tar."""

    name: str
    file: Path
    offset: int
    size: int

    @property
    def basename(self) -> str:
        return PurePosixPath(self.name).name

    def read(self) -> bytes:
        if self.size > _MAX_SMALL_FILE:
            raise CheckpointError(f"{self.file}: {self.name} has {self.size} bytes, at most {_MAX_SMALL_FILE} expected")
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def md5_of(file: Path, progress: ProgressReport = no_progress) -> str:
    """MD5 of a file, as published beside the release."""
    digest, total, done = hashlib.md5(usedforsecurity=False), file.stat().st_size, 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return digest.hexdigest()


def is_release(source: Path) -> bool:
    """Whether `source` looks like a release: a file, or a directory with the release's tracker file."""
    return source.is_file() or (source / _TRACKER).is_file()


def open_release(source: Path, vocabulary: Path | None = None) -> AdeptCheckpoint:
    """Open a tar, an unpacked tar or a `.pt`; `vocabulary` is the SentencePiece file when it is not there.

    Raises CheckpointError for anything damaged, hostile or not a Persimmon, NotFoundError for what is missing.
    """
    members = list(_members(source))
    weights = _weights(source, members)
    content = open_torch_file(weights.file, weights.offset, weights.size)
    if not isinstance(content.root, dict) or "model" not in content.root:
        raise CheckpointError(f"{weights.file}: {weights.name} is no training checkpoint: it has no 'model'")
    found = content.tensors(content.root["model"])
    tokenizer = _tokenizer(source, members, vocabulary)
    args = getattr(content.root.get("args"), "state", None)
    config, notes = config_from_args(args if isinstance(args, Mapping) else {}, found, tokenizer, weights.file)
    tensors = check_tensors(found, config, weights.file, naming="adept")
    return AdeptCheckpoint(config, tensors, tokenizer, tuple(notes))


def _members(source: Path) -> Iterator[_Member]:
    """The files of the release."""
    if source.is_dir():
        for file in sorted(source.rglob("*")):
            if file.is_file():
                yield _Member(file.relative_to(source).as_posix(), file, 0, file.stat().st_size)
    elif not source.is_file():
        raise NotFoundError(f"{source} does not exist")
    elif looks_like_tar(source):
        yield from _tar_members(source)
    else:
        yield _Member(source.name, source, 0, source.stat().st_size)


def looks_like_tar(file: Path) -> bool:
    """A tar's first header has `ustar` at byte 257; a torch file there has anything else."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\x00":
        raise CheckpointError(f"{file} is compressed; decompress it first (the release is a plain tar)")
    return head[257:262] == b"ustar"


def _tar_members(file: Path) -> Iterator[_Member]:
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for info in archive:
                if not info.isreg():
                    continue
                if info.sparse is not None or info.offset_data + info.size > size:
                    raise CheckpointError(f"{file}: truncated: {info.name} ends behind the end of the file")
                yield _Member(info.name, file, info.offset_data, info.size)
    except (tarfile.TarError, OverflowError) as error:
        raise CheckpointError(f"{file}: damaged or truncated tar: {error}") from None


def _weights(source: Path, members: Sequence[_Member]) -> _Member:
    """The one `.pt`; of several iterations the one that the tracker file names."""
    found = [member for member in members if member.name.endswith(".pt")] or [
        m for m in members if m.name == source.name
    ]
    tracker = next((member for member in members if member.basename == _TRACKER), None)
    if len(found) > 1 and tracker is not None:
        iteration = tracker.read().decode(errors="replace").strip()
        folder = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        found = [member for member in found if folder in PurePosixPath(member.name).parts]
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{source}: no .pt file in it, so not a release of Persimmon")
    raise CheckpointError(
        f"{source}: {len(found)} weight files ({', '.join(m.name for m in found[:3])}); "
        "only releases in one piece (tensor parallel 1) are read"
    )


def _tokenizer(source: Path, members: Sequence[_Member], vocabulary: Path | None) -> Tokenizer:
    if vocabulary is not None:
        return Tokenizer.load(vocabulary)
    inside = next((member for member in members if member.basename == _VOCABULARY), None)
    if inside is not None:
        return Tokenizer(inside.read())
    # A .pt of the unpacked tar lies two folders below the vocabulary.
    near = [folder / _VOCABULARY for folder in list(source.resolve().parents)[:3]]
    file = next((file for file in near if file.is_file()), None)
    if file is None:
        raise NotFoundError(f"no {_VOCABULARY} in or near {source}; say where it is with --tokenizer FILE")
    return Tokenizer.load(file)
