"""The keys and values of a text on disk, so that a long document is read by the model once.

A prompt file has the form of safetensors: a header with tensors and metadata, then the data. It holds `token_ids`, one
tensor of bytes per layer in the decoder's own layout, and a CRC-32 of each of them. The metadata is the decoder's
`identity`: engine, weights, precisions. A file is used only if all of it is as expected; otherwise it is refused by
name, with what is wrong. It is written under a temporary name and renamed, so a full disk or a kill leaves the old
one.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from persimmon.atomic import replacing
from persimmon.config import ModelConfig
from persimmon.errors import NotFoundError, PromptFileError, StorageError, UnavailableError
from persimmon.infer.decoder import CachedSequence, Decoder

_KIND = {"kind": "persimmon prompt", "version": "2"}
_MAX_HEADER = 1 << 20
"""Bytes; a header with 36 layers has 4,000."""

_ITEM_BYTES = {"token_ids": 4, "checksums": 4}
"""Of the tensors that are not bytes."""

_WHAT = {
    "engine": "by another engine",
    "weights": "with other weights",
    "rotary_precision": "with another rotary precision",
    "kv_dtype": "with keys and values of another type",
    "sums": "with sums in another order, as bfloat16 weights have on AMX",
}


class StorableSequence(CachedSequence, Protocol):
    """A sequence that can be written down."""

    def saved(self, layer: int, length: int) -> NDArray[np.uint8]:
        """Keys and values of the first `length` tokens in a layer, as flat bytes in the decoder's own layout."""

    def restore(self, length: int, saved_length: int, layers: Iterable[NDArray[np.uint8]]) -> None:
        """Hold the first `length` of `saved_length` tokens, whose `saved` bytes come layer by layer; sets `length`.

        Raises ContextLengthError when they do not fit, InputError for bytes of a wrong size.
        """


@runtime_checkable
class StorableDecoder(Protocol):
    """A decoder whose sequences are StorableSequences."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What keys and values depend on besides the tokens: those of two decoders fit if and only if this is equal."""

    def new_sequence(self, capacity: int) -> StorableSequence:
        """See infer.decoder."""


class PromptFile:
    """An open prompt file whose header fits the decoder."""

    def __init__(self, path: Path, decoder: StorableDecoder) -> None:
        """Raises NotFoundError without a file, PromptFileError for one that cannot be used."""
        self.path = path
        self._num_layers = decoder.config.num_layers
        try:
            self._file: BinaryIO = path.open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"no prompt file {path}") from None
        except OSError as error:
            raise PromptFileError(f"prompt file {path} cannot be read: {error.strerror}") from None
        try:
            self._offsets = self._read_header(decoder.identity)
            self._sums = np.frombuffer(self._read("checksums"), np.uint32)
            if len(self._sums) != self._num_layers + 1:
                raise self._wrong("it is damaged")
            self.token_ids: list[int] = np.frombuffer(self._checked("token_ids", 0), np.int32).tolist()
        except BaseException:
            self.close()
            raise

    def restore(self, sequence: StorableSequence, length: int) -> None:
        """Make the sequence hold the first `length` tokens; one that cannot be restored is left empty."""
        sequence.truncate(0)
        sequence.restore(length, len(self.token_ids), self._layers())

    def close(self) -> None:
        """Done with it."""
        self._file.close()

    def _layers(self) -> Iterator[NDArray[np.uint8]]:
        for layer in range(self._num_layers):
            yield np.frombuffer(self._checked(f"layers.{layer}", layer + 1), np.uint8)

    def _read_header(self, identity: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Where the tensors are, from the beginning of the file; checks everything but the data."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        try:
            if not 2 <= length <= min(_MAX_HEADER, size):
                raise ValueError
            header = json.loads(self._file.read(length))
            metadata: dict[str, str] = header.pop("__metadata__")
            offsets = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            is_ours = all(metadata.pop(key, None) == value for key, value in _KIND.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._wrong("it is not a prompt file of this version") from None
        if not is_ours:
            raise self._wrong("it is not a prompt file of this version")
        self._compare(metadata, identity)
        return self._check_offsets(offsets, 8 + length, size)

    def _compare(self, metadata: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        for name in (*identity, *metadata):
            found, expected = metadata.get(name), identity.get(name)
            if found != expected:
                what = _WHAT.get(name, f"with another {name}")
                raise self._wrong(f"it was made {what}: {name} is {found!r} there and {expected!r} here")

    def _check_offsets(self, offsets: Mapping[str, Any], start: int, size: int) -> dict[str, tuple[int, int]]:
        """Absolute places; they must follow each other and fill the file."""
        end, found = 0, {}
        for name in tensor_names(self._num_layers):
            match offsets.get(name):
                case (int(first), int(last)) if first == end <= last and (last - first) % _ITEM_BYTES.get(name, 1) == 0:
                    found[name], end = (start + first, start + last), last
                case _:
                    raise self._wrong("its header is damaged")
        if size != start + end:
            raise self._wrong(f"it has {size} bytes instead of {start + end}: it was cut off or is damaged")
        return found

    def _read(self, name: str) -> bytes:
        start, end = self._offsets[name]
        self._file.seek(start)
        return self._file.read(end - start)

    def _checked(self, name: str, index: int) -> bytes:
        data = self._read(name)
        if zlib.crc32(data) != self._sums[index]:
            raise self._wrong(f"its {name} are damaged")
        return data

    def _wrong(self, reason: str) -> PromptFileError:
        return PromptFileError(f"prompt file {self.path} cannot be used: {reason}")


def check_place(path: Path) -> None:
    """Raise StorageError where no prompt file can be: what is wrong shows before a model reads anything."""
    number = 0
    if path.is_dir():
        number = errno.EISDIR
    elif not path.exists() and not path.parent.is_dir():
        number = errno.ENOENT
    elif not path.exists() and not os.access(path.parent, os.W_OK):
        number = errno.EACCES
    if number:
        raise StorageError(f"prompt file {path} cannot be written: {os.strerror(number)}")


def storable(decoder: Decoder, sequence: CachedSequence) -> tuple[StorableDecoder, StorableSequence]:
    """The same two, if the engine can write sequences down; else UnavailableError."""
    if not isinstance(decoder, StorableDecoder):
        raise UnavailableError(f"the {decoder.name} engine cannot keep prompts in files")
    return decoder, cast(StorableSequence, sequence)


def tensor_names(num_layers: int) -> list[str]:
    """The tensors of a file in their order; the checksums stand last, when they are known."""
    return ["token_ids", *(f"layers.{layer}" for layer in range(num_layers)), "checksums"]


def write(path: Path, decoder: StorableDecoder, sequence: StorableSequence, token_ids: Sequence[int]) -> None:
    """Store what the sequence holds of `token_ids`, which are its first tokens.

    Raises StorageError when it cannot be written; an older file is then left as it was.
    """
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            _write_tensors(file, decoder, sequence, token_ids)
    except OSError as error:
        raise StorageError(f"prompt file {path} cannot be written: {error.strerror or error}") from None


def _write_tensors(
    file: BinaryIO, decoder: StorableDecoder, sequence: StorableSequence, token_ids: Sequence[int]
) -> None:
    num_layers, length = decoder.config.num_layers, len(token_ids)
    ids = np.asarray(token_ids, np.int32)
    layer = sequence.saved(0, length)
    sizes = [ids.nbytes, *[layer.nbytes] * num_layers, 4 * (num_layers + 1)]
    ends = np.cumsum(sizes).tolist()
    header: dict[str, Any] = {"__metadata__": {**_KIND, **decoder.identity}}
    for name, size, end in zip(tensor_names(num_layers), sizes, ends, strict=True):
        kind = {"token_ids": "I32", "checksums": "U32"}.get(name, "U8")
        shape = [size // _ITEM_BYTES.get(name, 1)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end - size, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text + ids.tobytes())
    sums = [zlib.crc32(ids.data)]
    for index in range(num_layers):
        layer = sequence.saved(index, length)  # one layer in memory at a time
        sums.append(zlib.crc32(layer.data))
        file.write(layer.data)
    file.write(np.array(sums, np.uint32).tobytes())
