"""Fingerprints of large files: damage is noticed at the speed of the page cache, without mapping the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.errors import CheckpointError
from persimmon.fast.cpu.native_module import native

_PIECE_BYTES = 8 << 20
_MASK = (1 << 64) - 1

Report = Callable[[int], None]
"""Gets the bytes of every finished piece."""


def fingerprint_file(
    file: Path, threads: int, report: Report | None = None, into: NDArray[np.uint8] | None = None
) -> str:
    """64 bits in hexadecimal over pieces of 8 MiB.

    into: memory of the file's size that shall hold its bytes afterwards: a piece is fingerprinted where it was read to.
    """
    value = size = file.stat().st_size
    for part in _each_piece(file, size, threads, report, into, native().fingerprint):
        # Order matters: swapped pieces are damage too.
        value = ((value ^ int(part)) * 0x9E3779B97F4A7C15 + 1) & _MASK
    return f"{value:016x}"


def read_file(file: Path, threads: int, report: Report | None, into: NDArray[np.uint8]) -> None:
    """The file's bytes, unchecked."""
    _each_piece(file, into.size, threads, report, into, lambda data: None)


def _each_piece(
    file: Path,
    size: int,
    threads: int,
    report: Report | None,
    into: NDArray[np.uint8] | None,
    use: Callable[[NDArray[np.uint8]], Any],
) -> list[Any]:
    """What `use` makes of every piece, in order.

    Pieces are read and not mapped: a mapping would count the whole file as this process's memory.
    """
    if into is not None and into.size != size:
        raise CheckpointError(f"{file} has {size} bytes, {into.size} expected")
    kept = threading.local()

    def piece(start: int) -> Any:
        count = min(_PIECE_BYTES, size - start)
        if into is not None:
            data = into[start : start + count]
        else:
            if not hasattr(kept, "buffer"):  # one per thread: fresh memory would cost as much as the reading
                kept.buffer = np.empty(_PIECE_BYTES, np.uint8)
            data = kept.buffer[:count]
        _read_fully(file, descriptor, data, start)
        if report is not None:
            report(count)
        return use(data)

    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(piece, range(0, size, _PIECE_BYTES)))
    finally:
        os.close(descriptor)


def _read_fully(file: Path, descriptor: int, data: NDArray[np.uint8], start: int) -> None:
    view = data.data
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise CheckpointError(f"{file} is truncated: {len(view)} bytes are missing at byte {start}")
        view, start = view[count:], start + count
