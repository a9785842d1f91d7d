"""Packed directories: `quantization.json` and one safetensors file per layer, opened, checked and memory-mapped.

    quantization.json                {"version", "format", "embedding", ..., "files": {name: {"bytes", "fingerprint"}}}
    packed-00001-of-000NN.safetensors   the embedding, as it was
    packed-00002 ...                    one decoder layer each
    packed-000NN                        final norm and head
    config.json, tokenizer files        as in the source

Nothing is trusted: names, types, shapes and sizes must be those of the configuration, and every file's fingerprint must
match unless verification is turned off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints import shards
from persimmon.checkpoints.directory import read_config
from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.checkpoints.staging import PACKED_FILE
from persimmon.checkpoints.tensors import StoredTensor, describe
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, NotFoundError
from persimmon.fast.cpu.fingerprints import fingerprint_file, read_file
from persimmon.fast.cpu.formats import (
    FORMATS,
    PACKED_FORMATS,
    Format,
    PackedTensor,
    embedding_tensors,
    head_tensors,
    layer_tensors,
)
from persimmon.fast.cpu.sources import map_array


def file_name(number: int, config: ModelConfig) -> str:
    """Name of file `number`, counted from 0."""
    return f"packed-{number + 1:05d}-of-{config.num_layers + 2:05d}.safetensors"


def planned_tensors(config: ModelConfig, form: Format, embedding: str) -> list[list[PackedTensor]]:
    """The tensors of every file."""
    layers = [layer_tensors(config, form, layer) for layer in range(config.num_layers)]
    return [embedding_tensors(config, embedding), *layers, head_tensors(config, form)]


def planned_bytes(config: ModelConfig, form: Format, embedding: str) -> int:
    """Bytes of all tensors."""
    return sum(tensor.num_bytes for file in planned_tensors(config, form, embedding) for tensor in file)


def is_packed(directory: Path) -> bool:
    """Whether it is a packed directory."""
    return (directory / PACKED_FILE).is_file()


@dataclass(frozen=True)
class PackedDirectory:
    """An opened packed model; its tensors are all there with the right types and shapes."""

    path: Path
    config: ModelConfig
    form: Format
    embedding: str
    tensors: dict[str, StoredTensor]
    sizes: dict[str, int]
    """Bytes of every file, by its name."""
    fingerprints: dict[str, str]

    def tensors_of(self, file: str) -> list[StoredTensor]:
        """The tensors that lie in a file."""
        return [tensor for tensor in self.tensors.values() if tensor.file.name == file]

    def map(self, tensors: Iterable[StoredTensor] | None = None) -> dict[str, NDArray[Any]]:
        """Every tensor, or these, memory-mapped."""
        chosen = self.tensors.values() if tensors is None else tensors
        return {tensor.name: map_array(tensor) for tensor in chosen}

    def verify(self, threads: int, progress: ProgressReport = no_progress) -> None:
        """Compare the fingerprint of every file; CheckpointError names the first that is damaged."""
        self.read(threads, progress, {})

    def read(
        self, threads: int, progress: ProgressReport, into: Mapping[str, NDArray[np.uint8]], *, verify: bool = True
    ) -> None:
        """Read files into the memory that `into` has for them and, in the same pass, compare all fingerprints.

        verify: compare; without, only the files of `into` are read. Raises CheckpointError as `verify` does.
        """
        names = self.sizes if verify else into
        total, done = sum(self.sizes[name] for name in names), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for name in names:
            file, expected = self.path / name, self.fingerprints[name]
            if not verify:
                read_file(file, threads, report, into[name])
                continue
            found = fingerprint_file(file, threads, report, into.get(name))
            if found != expected:
                raise CheckpointError(f"{file} is damaged: fingerprint {found}, expected {expected}")


def open_packed(directory: Path) -> PackedDirectory:
    """Open a packed directory. Raises NotFoundError or a CheckpointError that names file and fault."""
    config = read_config(directory)
    file = directory / PACKED_FILE
    form, embedding, listed = _read_description(file)
    plan = planned_tensors(config, form, embedding)
    expected_names = [file_name(number, config) for number in range(len(plan))]
    if sorted(listed) != expected_names:
        raise CheckpointError(f"{file}: lists {len(listed)} files, {len(expected_names)} expected for this config.json")
    tensors: dict[str, StoredTensor] = {}
    for name, expected in zip(expected_names, plan, strict=True):
        tensors |= _checked_file(directory / name, listed[name][0], expected)
    sizes, fingerprints = ({name: listed[name][part] for name in expected_names} for part in (0, 1))
    return PackedDirectory(directory, config, form, embedding, tensors, sizes, fingerprints)  # type: ignore[arg-type]


def _read_description(file: Path) -> tuple[Format, str, dict[str, tuple[int, str]]]:
    """(format, embedding type, {file: (bytes, fingerprint)}) of a quantization.json."""
    document = shards.read_json(file)
    try:
        version, name, embedding = document["version"], document["format"], document["embedding"]
        listed = {str(key): (int(f["bytes"]), str(f["fingerprint"])) for key, f in document["files"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: version, format, embedding or files is missing or malformed: {error}") from None
    if name not in PACKED_FORMATS or embedding not in ("BF16", "F32"):
        raise CheckpointError(f"{file}: unknown format {name!r} or embedding type {embedding!r}")
    if version != FORMATS[name].layout:
        raise CheckpointError(
            f"{file}: layout version {version!r} of {name}; this program reads version {FORMATS[name].layout}: "
            "quantize the model again (persimmon quantize)"
        )
    return FORMATS[name], embedding, listed


def _checked_file(file: Path, size: int, expected: Sequence[PackedTensor]) -> dict[str, StoredTensor]:
    """The tensors of one file, which must be exactly the expected ones."""
    if not file.is_file():
        raise NotFoundError(f"{file} is missing")
    found_size = file.stat().st_size
    if found_size != size:
        state = "truncated" if found_size < size else "too long"
        raise CheckpointError(f"{file} is {state}: {size} bytes expected, {found_size} found")
    found = {tensor.name: tensor for tensor in shards.read_file(file)}
    for want in expected:
        have = found.pop(want.name, None)
        if have is None:
            raise CheckpointError(f"{file}: {want.name} is missing")
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            raise CheckpointError(
                f"{file}: {want.name} should be {describe(want.dtype, want.shape)}, "
                f"found {describe(have.dtype, have.shape)}"
            )
    if found:
        raise CheckpointError(f"{file}: {next(iter(found))} is no part of the model")
    return {tensor.name: tensor for tensor in shards.read_file(file)}
