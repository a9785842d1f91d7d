"""Files written by `torch.save`, opened as data: plain values and the places of tensors. No torch, no code run.

Two layouts (pytorch `torch/serialization.py`). Since 1.6 a zip archive with `NAME/data.pkl` and one uncompressed entry
`NAME/data/KEY` per storage. Before that five parts in a row: the pickles of a magic number, the protocol version, the
system's facts, the object and the list of storage keys, then per storage its number of elements (int64) and its bytes.
Either may lie anywhere inside a larger file, such as a tar.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from persimmon.checkpoints.pickles import PickleReader
from persimmon.checkpoints.tensors import ITEM_BYTES, StoredTensor
from persimmon.errors import CheckpointError, NotFoundError

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_READ_BYTES = 64 << 20  # of pickles and archive directories; an honest one takes a few
_MAX_DEPTH = 16  # dictionaries around a tensor; the release has four
_MAX_ENTRIES = 100_000  # of all these dictionaries; the 8B has some 700

_STORAGE_TYPES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
}  # fmt: skip

# Names that training checkpoints mention beside their tensors: arguments and random states. None of them is used.
_INERT_NAMES = frozenset(
    {
        "argparse.Namespace", "_codecs.encode", "builtins.set", "__builtin__.set", "pathlib.PosixPath", "torch.Size",
        "torch.device", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
        "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.int64", "torch.uint8",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Reference:
    """A storage as the pickle mentions it."""

    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the pickle before its storage has been found in the file; offset and strides in elements."""

    storage: _Reference
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    """Where the bytes of a storage are, counted from the start of the file."""

    offset: int
    size: int
    crc32: int | None = None


class TorchFile:
    """The object of a `torch.save` file. `root` is plain data; tensors in it are turned into places by `tensors`."""

    def __init__(self, file: Path, root: Any, storages: Mapping[str, _Storage]) -> None:
        self.file = file
        self.root = root
        self._storages = storages

    def tensors(self, tree: Any) -> list[StoredTensor]:
        """The tensors in nested dictionaries, named by their keys joined with dots. None values are left out."""
        return [self._locate(name, value) for name, value in self._leaves(tree) if value is not None]

    def _leaves(self, tree: Any) -> Iterator[tuple[str, Any]]:
        """Everything in the tree that is no dictionary. Bounded, since shared or circular ones can look endless."""
        pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
        visited = 0
        while pending:
            keys, node = pending.pop()
            if not isinstance(node, dict):
                yield ".".join(keys), node
                continue
            visited += len(node)
            if len(keys) == _MAX_DEPTH or visited > _MAX_ENTRIES:
                raise CheckpointError(f"{self.file}: {'.'.join(keys)}: no honest checkpoint has so many entries")
            pending += [((*keys, str(key)), value) for key, value in reversed(node.items())]

    def _locate(self, name: str, tensor: Any) -> StoredTensor:
        if not isinstance(tensor, _Tensor):
            raise CheckpointError(f"{self.file}: {name}: a tensor expected, {type(tensor).__name__} found")
        dtype, storage = tensor.storage.dtype, self._storages.get(tensor.storage.key)
        if storage is None:
            raise CheckpointError(f"{self.file}: {name}: its storage {tensor.storage.key!r} is missing")
        if not _is_row_major(tensor.shape, tensor.stride):
            raise CheckpointError(f"{self.file}: {name}: strides {tensor.stride} of {tensor.shape} are not row-major")
        item = ITEM_BYTES[dtype]
        size, start = math.prod(tensor.shape) * item, tensor.offset * item
        if start + size > storage.size:
            raise CheckpointError(
                f"{self.file}: {name}: bytes {start} to {start + size} of its storage expected, it has {storage.size}"
            )
        whole = size == storage.size
        return StoredTensor(
            name, dtype, tensor.shape, self.file, storage.offset + start, storage.crc32 if whole else None
        )


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements lie one behind the other; the stride of a dimension of one element means nothing."""
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and distance != step:
            return False
        step *= max(1, size)
    return True


def read_torch_file(file: Path) -> list[StoredTensor]:
    """The tensors of a state dict: a `pytorch_model.bin`."""
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist")
    content = open_torch_file(file)
    return content.tensors(content.root)


def open_torch_file(file: Path, offset: int = 0, size: int | None = None) -> TorchFile:
    """Open the `torch.save` file that fills `size` bytes of `file` from `offset`."""
    window = _Window(file, offset, file.stat().st_size - offset if size is None else size)
    with window:
        return _open_zip(file, window) if window.at(0, 4) == _ZIP_MAGIC else _open_legacy(file, window)


class _Window(io.RawIOBase):
    """A part of a file that reads like a file of its own, never much at once: sizes in a file may be lies."""

    def __init__(self, file: Path, offset: int, size: int) -> None:
        self._stream = file.open("rb", buffering=0)
        self.offset, self.size = offset, size
        self._position = 0

    def at(self, position: int, count: int) -> bytes:
        """Bytes from a place; fewer at the end."""
        self.seek(position)
        return self.read(count)

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + position)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._position)
        count = left if count < 0 else min(count, left)
        if count > _MAX_READ_BYTES:
            raise ValueError(f"{count} bytes of anything but tensors")
        self._stream.seek(self.offset + self._position)
        data = self._stream.read(count) or b""
        self._position += len(data)
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()


# -- the pickle ----------------------------------------------------------------------------------------------


def _reader(file: Path, references: dict[str, _Reference]) -> PickleReader:
    """A reader of torch's pickles that notes every storage they mention in `references`."""

    def persistent(value: Any) -> _Reference:
        kind, storage_type, key, _, _, *view = value
        if kind != "storage" or any(part is not None for part in view) or type(key) is not str:
            raise ValueError(f"a reference to a {kind!r}")
        reference = _Reference(_STORAGE_TYPES[storage_type.name], key)
        references[key] = reference
        return reference

    def allowed(name: str) -> bool:
        return name in calls or name in _INERT_NAMES or name in _STORAGE_TYPES or name.startswith("megatron.")

    calls: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
    }
    return PickleReader(str(file), allowed, calls, persistent)


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    if not isinstance(storage, _Reference):
        raise ValueError("a tensor without a storage")
    sizes, distances = tuple(map(_size, shape)), tuple(map(_size, stride))
    if len(sizes) != len(distances):
        raise ValueError(f"a tensor of {len(sizes)} dimensions with {len(distances)} strides")
    return _Tensor(storage, _size(offset), sizes, distances)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"a size of {value!r}")
    return value


# -- zip -----------------------------------------------------------------------------------------------------


def _open_zip(file: Path, window: _Window) -> TorchFile:
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], window))
        entries = {info.filename: info for info in archive.infolist()}
        folder = _folder(file, entries)
        order = entries.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError(f"{file}: only little-endian torch files are read")
        pickle = archive.read(entries[f"{folder}data.pkl"])
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        struct.error,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:
        raise CheckpointError(f"{file}: damaged or truncated torch file: {error}") from None
    root = _reader(file, {}).read(io.BytesIO(pickle))
    prefix = f"{folder}data/"
    storages = {
        name.removeprefix(prefix): _zip_entry(file, window, info)
        for name, info in entries.items()
        if name.startswith(prefix)
    }
    return TorchFile(file, root, storages)


def _folder(file: Path, entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive that holds everything."""
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise CheckpointError(f"{file}: not a torch file: {len(found)} data.pkl in the archive, one expected")
    folder = found[0].removesuffix("data.pkl")
    for name in ("data.pkl", "byteorder"):
        entry = entries.get(f"{folder}{name}")
        if entry is not None and (entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MAX_READ_BYTES):
            raise CheckpointError(f"{file}: {entry.filename} is compressed or larger than {_MAX_READ_BYTES} bytes")
    return folder


def _zip_entry(file: Path, window: _Window, info: zipfile.ZipInfo) -> _Storage:
    """The bytes of an uncompressed entry lie behind its local header of 30 bytes, its name and its extra field."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{file}: {info.filename} is compressed or encrypted, which torch never writes")
    header = window.at(info.header_offset, 30)
    if len(header) != 30 or not header.startswith(_ZIP_MAGIC):
        raise CheckpointError(f"{file}: {info.filename} is not where the archive's directory says")
    name_size, extra_size = struct.unpack_from("<HH", header, 26)
    start = info.header_offset + 30 + name_size + extra_size
    if start + info.file_size > window.size:
        raise CheckpointError(f"{file}: {info.filename} ends behind the end of the file")
    return _Storage(window.offset + start, info.file_size, info.CRC)


# -- before zip ----------------------------------------------------------------------------------------------


def _open_legacy(file: Path, window: _Window) -> TorchFile:
    references: dict[str, _Reference] = {}
    reader = _reader(file, references)
    stream = io.BytesIO(window.at(0, min(window.size, _MAX_READ_BYTES)))
    if stream.getvalue()[:1] != b"\x80" or reader.read(stream) != _LEGACY_MAGIC:
        raise CheckpointError(f"{file}: not a torch file: neither a zip archive nor a pickle with torch's magic number")
    reader.read(stream)  # the protocol version, which has been 1001 ever since
    facts = reader.read(stream)
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise CheckpointError(f"{file}: only little-endian torch files are read")
    root, keys = reader.read(stream), reader.read(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in references for key in keys):
        raise CheckpointError(f"{file}: the list of storages is damaged")
    position, storages = stream.tell(), {}
    for key in keys:
        size = int.from_bytes(window.at(position, 8), "little") * ITEM_BYTES[references[key].dtype]
        if position + 8 + size > window.size:
            raise CheckpointError(f"{file}: truncated: storage {key} of {size} bytes ends behind the end of the file")
        storages[key] = _Storage(window.offset + position + 8, size)
        position += 8 + size
    return TorchFile(file, root, storages)
