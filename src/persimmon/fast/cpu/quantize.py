"""Hub directory -> packed directory, layer by layer in bounded memory.

Every layer becomes one file, so the peak is one packed layer and a slice of its source (about 0.3 GiB for the 8B). The
files gather in `.NAME.partial` beside the target, which takes its name when everything is there; an interrupted run
goes on where it stopped when source and settings are the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.atomic import write_text
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.shards import ProgressReport, no_progress, write_file
from persimmon.checkpoints.staging import CONFIG_FILE, PACKED_FILE
from persimmon.checkpoints.tensors import CHUNK_BYTES, StoredTensor, TensorData
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cpu.fingerprints import fingerprint_file
from persimmon.fast.cpu.formats import GROUP, OUTLIERS, SUPERBLOCK, Format, packed_format
from persimmon.fast.cpu.packed import file_name, planned_bytes
from persimmon.fast.cpu.packing import Arrays, Packer
from persimmon.fast.cpu.sources import FloatSource
from persimmon.machine import cpu_threads

_DTYPES = {"uint8": "U8", "float32": "F32", "int32": "I32"}

# Files of a source directory that describe its weights, which the packed directory does not have.
_NOT_COPIED = ("checksums.json", "vocabulary_dropped.safetensors")


@dataclass(frozen=True)
class _ArrayTensor:
    """An array in memory as a tensor to write."""

    name: str
    array: NDArray[Any]

    @property
    def dtype(self) -> str:
        return _DTYPES[str(self.array.dtype)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def chunks(self) -> Iterator[memoryview]:
        data = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def quantize(
    source: Path,
    target: Path,
    format_name: str,
    *,
    threads: int | None = None,
    outliers: Mapping[int, NDArray[np.int32]] | None = None,
    progress: ProgressReport = no_progress,
) -> None:
    """Write the packed model of a hub directory.

    outliers: the exact columns of a layer's up projection where they were measured; else those with the largest
    LayerNorm gain. progress: called with (bytes written, bytes in all).
    Raises InputError for an unknown format or a target that is not empty, CheckpointError for a bad source.
    """
    form = packed_format(format_name)
    opened = open_directory(source)
    embedding = opened.tensors["embed_tokens.weight"]
    if embedding.dtype not in ("BF16", "F32"):
        raise InputError(f"{source}: the embedding is {embedding.dtype}; bfloat16 or float32 weights are quantized")
    threads = threads or cpu_threads()
    packer = Packer(FloatSource(opened), opened.config, form, threads, outliers)
    identity = {"source": _identity(opened.tensors), "outliers": _listed(outliers)}
    writer = PackedWriter(target, opened.config, form, embedding.dtype, identity, threads, progress)
    writer.run(embedding, packer)
    for file in source.iterdir():
        if file.is_file() and _is_copied(file):
            shutil.copyfile(file, writer.partial / file.name)
    writer.finish()


def _identity(tensors: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """What tells the source's weights from others: size and time of its files."""
    files = sorted({tensor.file for tensor in tensors.values()})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _listed(outliers: Mapping[int, NDArray[np.int32]] | None) -> dict[str, list[int]]:
    return {str(layer): columns.tolist() for layer, columns in (outliers or {}).items()}


class PackedWriter:
    """The files of a packed directory, written one by one and remembered."""

    def __init__(
        self,
        target: Path,
        config: ModelConfig,
        form: Format,
        embedding: str,
        identity: Mapping[str, Any],
        threads: int,
        progress: ProgressReport = no_progress,
    ) -> None:
        """`embedding`: its type. `identity`: what must be the same for an interrupted run to go on."""
        self._target = target.resolve()
        if self._target.is_file() or (self._target.is_dir() and any(self._target.iterdir())):
            raise InputError(f"{target} already exists; remove it or choose another directory")
        self._config, self._threads, self._progress = config, threads, progress
        self._description = {
            "version": form.layout,
            "format": form.name,
            "group": GROUP,
            "superblock": SUPERBLOCK,
            "outlier_columns": OUTLIERS if form.mlp == "planes" else 0,
            "embedding": embedding,
        }
        self.partial = self._target.with_name(f".{self._target.name}.partial")
        """Where the files gather."""
        self._record = self.partial / "progress.json"
        self._identity = {**self._description, **identity, "config": config.to_hub()}
        self._done_bytes, self._total = 0, planned_bytes(config, form, embedding)
        self._files: dict[str, dict[str, Any]] = self._resume()

    def run(self, embedding: TensorData, packer: Packer) -> None:
        """Write every file that is not there yet."""
        layers = self._config.num_layers
        makers: list[Callable[[], list[TensorData]]] = [lambda: [embedding]]
        makers += [lambda index=index: _tensors(packer.layer(index)) for index in range(layers)]  # type: ignore[misc]
        makers += [lambda: _tensors(packer.head())]
        for number, make in enumerate(makers):
            self._write(file_name(number, self._config), make)

    def write_config(self) -> None:
        """`config.json`, for a model that has no source to copy it from."""
        _write_json(self.partial / CONFIG_FILE, self._config.to_hub())

    def finish(self) -> None:
        """Describe the model and give the directory its name."""
        self._record.unlink()
        _write_json(self.partial / PACKED_FILE, {**self._description, "files": self._files})
        if self._target.is_dir():
            self._target.rmdir()
        self.partial.rename(self._target)

    def _resume(self) -> dict[str, dict[str, Any]]:
        """The files that an interrupted run of the same settings finished; anything else is cleared away."""
        try:
            record = json.loads(self._record.read_text())
            files: dict[str, dict[str, Any]] = record["files"]
            same = record["identity"] == json.loads(json.dumps(self._identity)) and all(
                (self.partial / name).stat().st_size == facts["bytes"] for name, facts in files.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if same:
            return files
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return {}

    def _write(self, name: str, make: Callable[[], list[TensorData]]) -> None:
        if name in self._files:
            self._report(self._files[name]["bytes"])
            return
        growing, file = self.partial / f"{name}.growing", self.partial / name
        digest = write_file(growing, make(), self._report)
        fingerprint = fingerprint_file(growing, self._threads)
        os.replace(growing, file)
        self._files[name] = {"bytes": digest.size, "fingerprint": fingerprint}
        _write_json(self._record, {"identity": self._identity, "files": self._files})

    def _report(self, count: int) -> None:
        self._done_bytes += count
        self._progress(min(self._done_bytes, self._total), self._total)


def _tensors(arrays: Arrays) -> list[TensorData]:
    return [_ArrayTensor(name, array) for name, array in arrays.items()]


def _is_copied(file: Path) -> bool:
    """Tokenizer, configuration, model card and licence go along; weights and what describes them do not."""
    described = file.name in _NOT_COPIED or file.name.endswith(".index.json")
    return not described and file.suffix in (".json", ".model", ".jinja", ".md", ".txt", "")


def _write_json(file: Path, document: Any) -> None:
    write_text(file, json.dumps(document, indent=2) + "\n")
