"""Packing documents into rows: deterministic, weighted, resumable from two integers.

Every source is one endless virtual stream: its documents, cut into pieces of at most one row, shuffled anew each epoch
by a seeded permutation and laid end to end. Row k of a source is positions [k * length, (k + 1) * length) of that
stream; nothing is padded and nothing dropped. Which source feeds row n of the run follows from n and the weights alone.
So the whole state is the number of rows taken, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persimmon.data.tokens import TokenStore
from persimmon.errors import DataError


@dataclass(frozen=True)
class Row:
    """One packed row: ids and targets [length] and the offsets of its documents, 0 .. length."""

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    boundaries: list[int]
    source: str


class _Epoch:
    """One shuffled pass over a source: where each piece lies in the store and in the virtual stream."""

    def __init__(self, store: TokenStore, length: int, seed: int, epoch: int) -> None:
        starts, sizes = _cut(store.offsets, length)
        order = np.random.Generator(np.random.PCG64([seed, length, epoch])).permutation(len(starts))
        self.starts = starts[order]
        self.ends = np.cumsum(sizes[order])

    def slices(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of the store that make up positions [start, stop) of this pass."""
        index = int(np.searchsorted(self.ends, start, side="right"))
        parts = []
        while start < stop and index < len(self.ends):
            begin = int(self.ends[index - 1]) if index else 0
            end = min(stop, int(self.ends[index]))
            offset = int(self.starts[index]) + start - begin
            parts.append((offset, offset + end - start))
            start, index = end, index + 1
        return parts


def _cut(offsets: NDArray[np.uint64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and sizes of all documents cut into pieces of at most `length` tokens."""
    begin, end = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    sizes: NDArray[np.int64] = end - begin
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(begin)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begin[document] + nth * length
    return starts, np.minimum(length, begin[document] + sizes[document] - starts)


class PackedRows:
    """Rows of one length, mixed from several sources by weight."""

    def __init__(self, stores: Mapping[str, TokenStore], weights: Mapping[str, float], length: int, seed: int) -> None:
        if not stores or set(stores) != set(weights):
            raise DataError(f"weights {sorted(weights)} must name the sources {sorted(stores)}")
        if any(not weight > 0 for weight in weights.values()):
            raise DataError(f"source weights must be positive, got {dict(weights)}")
        if length < 1:
            raise DataError(f"the row length must be at least 1, got {length}")
        for name, store in stores.items():
            if not store.num_tokens:
                raise DataError(f"source {name!r} holds no documents")
        total = sum(weights.values())
        self.length, self._seed = length, seed
        self._stores = dict(stores)
        # Differences of the running sum, as every run so far: they decide ties between sources.
        self._shares = np.diff(np.cumsum([weights[name] / total for name in stores]), prepend=0.0)
        self._epochs: dict[str, tuple[int, _Epoch]] = {}
        # Source of each row so far, extended on demand: prefix counts make row n of the run row k of its source.
        self._choices: list[str] = []
        self._ordinals: list[int] = []
        self._taken = dict.fromkeys(stores, 0)

    def _choose(self, row: int) -> tuple[str, int]:
        names = list(self._stores)
        while len(self._choices) <= row:
            # The source that lags furthest behind its share. None is ever a whole row ahead; the one furthest behind
            # lacks at most half a row of two sources, less than one of three, little more than one of many.
            n = len(self._choices) + 1
            behind = [share * n - self._taken[name] for name, share in zip(names, self._shares, strict=True)]
            name = names[int(np.argmax(behind))]
            self._choices.append(name)
            self._ordinals.append(self._taken[name])
            self._taken[name] += 1
        return self._choices[row], self._ordinals[row]

    def _epoch(self, name: str, number: int) -> _Epoch:
        cached = self._epochs.get(name)
        if cached is None or cached[0] != number:
            cached = (number, _Epoch(self._stores[name], self.length, self._seed, number))
            self._epochs[name] = cached
        return cached[1]

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run, any number in any order."""
        if row < 0:
            raise IndexError(f"rows count from 0, got {row}")
        name, ordinal = self._choose(row)
        store = self._stores[name]
        position, needed = ordinal * self.length, self.length
        parts: list[tuple[int, int]] = []
        while needed:
            epoch, start = divmod(position, store.num_tokens)
            stop = min(start + needed, store.num_tokens)
            parts += self._epoch(name, epoch).slices(start, stop)
            position, needed = position + stop - start, needed - (stop - start)
        pieces = [store.read(a, b + 1) for a, b in parts]
        ids = np.concatenate([piece[:-1] for piece in pieces]).astype(np.int64)
        targets = np.concatenate([piece[1:] for piece in pieces]).astype(np.int64)
        boundaries = [0, *np.cumsum([b - a for a, b in parts]).tolist()]
        return Row(ids, targets, boundaries, name)
