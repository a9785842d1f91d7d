"""Tensors as bytes somewhere in a file: what every checkpoint format comes down to. No torch.

A `StoredTensor` is a name, an element type, a shape and a place; it is read in pieces, so that checkpoints far larger
than the memory can be checked, renamed, cut and written again.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from persimmon.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the element types' names in safetensors files."""

WEIGHT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The element types that weights can have, and torch's names for them."""

CHUNK_BYTES = 8 << 20
"""Most bytes of a tensor held in memory while it is copied."""


class TensorData(Protocol):
    """A named tensor whose bytes can be streamed."""

    @property
    def name(self) -> str:
        """Its name where it is going to be written."""

    @property
    def dtype(self) -> str:
        """Element type, a key of ITEM_BYTES."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, row-major."""

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, little-endian, in pieces of whole elements, each valid until the next is asked for."""


@dataclass(frozen=True)
class DerivedTensor:
    """What is computed from another tensor, under its name and in its shape; subclasses stream the bytes."""

    source: TensorData
    dtype: str

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.shape


def num_bytes(tensor: TensorData) -> int:
    """Bytes of the whole tensor."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def describe(dtype: str, shape: Sequence[int]) -> str:
    """A type and a shape as error messages show them: `BF16 [8192, 256]`."""
    return f"{dtype} {list(shape)}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in one piece in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """First byte, counted from the start of the file."""

    crc32: int | None = None
    """Checksum of the bytes where the format has one; a mismatch raises CheckpointError at the end of `chunks`."""

    def rename(self, name: str) -> StoredTensor:
        """The same bytes under another name."""
        return dataclasses.replace(self, name=name)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows `start` to `stop` of the first dimension."""
        row = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, offset=self.offset + start * row, crc32=None)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, read from the file as they are asked for."""
        left, crc = num_bytes(self), 0
        buffer = memoryview(bytearray(min(left, CHUNK_BYTES)))
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            while left:
                count = stream.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise CheckpointError(f"{self.file}: the file ends {left} bytes short of the end of {self.name}")
                if self.crc32 is not None:
                    crc = zlib.crc32(buffer[:count], crc)
                left -= count
                yield buffer[:count]
        if self.crc32 is not None and crc != self.crc32:
            raise CheckpointError(
                f"{self.file}: {self.name} is damaged: CRC-32 {self.crc32:08x} expected, {crc:08x} found"
            )


@dataclass(frozen=True)
class Concatenation:
    """Tensors that agree in all but the first dimension, one below the other."""

    name: str
    parts: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        """Element type of all parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows add up."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def chunks(self) -> Iterator[memoryview]:
        """The parts' bytes, one after the other."""
        for part in self.parts:
            yield from part.chunks()


@dataclass(frozen=True)
class ByteTensor:
    """Plain bytes as a U8 tensor."""

    name: str
    data: bytes

    @property
    def dtype(self) -> str:
        """Always U8."""
        return "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        """One dimension."""
        return (len(self.data),)

    def chunks(self) -> Iterator[memoryview]:
        """All of it at once."""
        yield memoryview(self.data)
