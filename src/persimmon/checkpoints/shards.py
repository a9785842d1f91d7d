"""safetensors files, read and written without torch and without holding a tensor in memory.

Layout (huggingface/safetensors README): eight bytes with the length of the header, little-endian; the header, JSON,
that maps each name to `{"dtype", "shape", "data_offsets": [first, end]}` counted from the header's end, padded with
spaces; then the tensors without gaps. Several files form one checkpoint through `model.safetensors.index.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.checkpoints.tensors import ITEM_BYTES, StoredTensor, TensorData, num_bytes
from persimmon.errors import CheckpointError, NotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DEFAULT_SHARD_BYTES = 4_000_000_000
"""Largest weight file written by default, so that every file system and upload takes it."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_ALIGNMENT = 64  # of the first tensor: a cache line, so that a memory-mapped file can be computed on as it is

ProgressReport = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class FileDigest:
    """What `checksums.json` keeps of one file."""

    size: int
    sha256: str


# -- reading -------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """The JSON document of a file; a name that stands twice in one object is an error, as is anything but JSON."""
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist")
    return parse_json(file.read_bytes(), str(file))


def parse_json(data: bytes, source: str) -> Any:
    """Like `read_json`, of bytes that came from `source`."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} stands twice")
        result[key] = value
    return result


def read_file(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises CheckpointError unless the header is well-formed and describes every byte of the file exactly once.
    """
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: not a whole safetensors file: its header should take {length} bytes, the file has {size}"
            )
        header = parse_json(stream.read(length), str(file))
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header must be an object")
    header.pop("__metadata__", None)
    tensors = [_entry(file, name, value, 8 + length) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, num_bytes(tensor)))
    _check_cover(file, tensors, 8 + length, size)
    return tensors


def _entry(file: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: {name}: {what}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"unknown dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape):
        raise wrong(f"shape must be a list of sizes, got {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets must be two offsets, got {offsets!r}")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise wrong(f"{dtype} {shape} takes {expected} bytes, data_offsets give it {offsets[1] - offsets[0]}")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(file: Path, tensors: Sequence[StoredTensor], start: int, size: int) -> None:
    for tensor in tensors:
        if tensor.offset != start:
            raise CheckpointError(
                f"{file}: {tensor.name} should begin at byte {start}, the header says {tensor.offset}"
            )
        start += num_bytes(tensor)
    if start != size:
        state = "truncated" if size < start else "longer than its header says"
        raise CheckpointError(f"{file}: {state}: {start} bytes expected, {size} found")


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name of an index; the names are plain, so nothing outside the directory is read."""
    index = read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is missing or empty")
    for name, part in weight_map.items():
        if not isinstance(part, str) or not part or Path(part).name != part or "\0" in part:
            raise CheckpointError(f"{file}: {name}: not a file name: {part!r}")
    return weight_map


# -- writing -------------------------------------------------------------------------------------------------


def write_file(file: Path, tensors: Sequence[TensorData], report: Callable[[int], None] | None = None) -> FileDigest:
    """Write one safetensors file; `report` gets the number of bytes of every piece written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + num_bytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for piece in _pieces(text, tensors):
            digest.update(piece)
            stream.write(piece)
            size += len(piece)
            if report is not None:
                report(len(piece))
        stream.flush()
        os.fsync(stream.fileno())
    return FileDigest(size, digest.hexdigest())


def _pieces(header: bytes, tensors: Sequence[TensorData]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        left = num_bytes(tensor)
        for chunk in tensor.chunks():
            left -= len(chunk)
            yield chunk
        assert left == 0, f"{tensor.name}: its chunks are {-left} bytes longer than {tensor.dtype} {tensor.shape}"


def split(tensors: Sequence[TensorData], max_bytes: int) -> list[list[TensorData]]:
    """Cut a list of tensors into files of at most `max_bytes`; a tensor larger than that gets its own."""
    groups: list[list[TensorData]] = [[]]
    filled = 0
    for tensor in tensors:
        size = num_bytes(tensor)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return groups


def write_checkpoint(
    directory: Path,
    tensors: Sequence[TensorData],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> dict[str, FileDigest]:
    """Write `model.safetensors`, or numbered shards and their index, into `directory`; digests by file name."""
    groups = split(tensors, max_shard_bytes)
    total, done = sum(map(num_bytes, tensors)), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    if len(groups) == 1:
        return {SINGLE_FILE: write_file(directory / SINGLE_FILE, groups[0], report)}
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    digests = {name: write_file(directory / name, group, report) for name, group in zip(names, groups, strict=True)}
    index = {
        "metadata": {"total_size": total, "total_parameters": sum(math.prod(t.shape) for t in tensors)},
        "weight_map": {t.name: name for name, group in zip(names, groups, strict=True) for t in group},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return digests
