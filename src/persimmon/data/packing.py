"""Packing documents into rows: deterministic, weighted, resumable from two integers.

Every source is one endless virtual stream: its documents, cut into pieces of at most one row, shuffled anew each epoch
by a seeded permutation and laid end to end. Row k of a source is positions [k * length, (k + 1) * length) of that
stream; nothing is padded and nothing dropped. Which source feeds row n of the run follows from n and the weights alone.
So the whole state is the number of rows taken, whatever the number of processes.

With `whole`, no document of up to one row is cut: each goes into the fullest unfinished row that has room for it, and
what stays free at the end of a row is padding without loss. A longer document fills whole rows, one after the other and
in order, and its rest begins the next one. The state is the same number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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


IGNORE = -100
"""Target that carries no loss (persimmon.train.loss)."""

_OPEN_ROWS = 1_024  # unfinished rows among which a whole document seeks its place

Spans = list[tuple[int, int]]


def pack_whole(offsets: NDArray[np.uint64], order: NDArray[np.int64], length: int) -> list[Spans]:
    """Rows of document spans of the store, no document of up to `length` tokens cut; best fit in the given order."""
    rows: list[Spans] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for start, stop in zip(offsets[order].tolist(), offsets[order + 1].tolist(), strict=True):
        long = stop - start > length
        while stop - start > length:
            rows.append([(start, start + length)])
            start += length
        place = len(room) if long else bisect_left(room, (stop - start, -1))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append((start, stop))
        else:
            free, row = length, len(rows)
            rows.append([(start, stop)])
        if free > stop - start:
            insort(room, (free - (stop - start), row))
        if len(room) > _OPEN_ROWS:
            room.pop(0)  # the fullest one
    return rows


class PackedRows:
    """Rows of one length, mixed from several sources by weight."""

    def __init__(
        self, stores: Mapping[str, TokenStore], weights: Mapping[str, float], length: int, seed: int,
        *, whole: bool = False,
    ) -> None:  # fmt: skip
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
        self.length, self._seed, self._whole = length, seed, whole
        self._packed: dict[str, list[list[Spans]]] = {name: [] for name in stores}  # by source and epoch
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
        parts = self._whole_row(name, ordinal) if self._whole else self._stream_row(name, ordinal)
        pieces = [store.read(a, b + 1) for a, b in parts]
        ids = np.concatenate([piece[:-1] for piece in pieces]).astype(np.int64)
        targets = np.concatenate([piece[1:] for piece in pieces]).astype(np.int64)
        boundaries = [0, *np.cumsum([b - a for a, b in parts]).tolist()]
        if padding := self.length - boundaries[-1]:  # a document of its own, of end-of-text pieces without targets
            ids = np.concatenate([ids, np.full(padding, int(store.read(0, 1)[0]))])
            targets = np.concatenate([targets, np.full(padding, IGNORE)])
            boundaries.append(self.length)
        return Row(ids, targets, boundaries, name)

    def _stream_row(self, name: str, ordinal: int) -> Spans:
        total = self._stores[name].num_tokens
        position, needed = ordinal * self.length, self.length
        parts: Spans = []
        while needed:
            epoch, start = divmod(position, total)
            stop = min(start + needed, total)
            parts += self._epoch(name, epoch).slices(start, stop)
            position, needed = position + stop - start, needed - (stop - start)
        return parts

    def _whole_row(self, name: str, ordinal: int) -> Spans:
        epochs, number = self._packed[name], 0
        while True:
            if number == len(epochs):
                offsets = self._stores[name].offsets
                random = np.random.Generator(np.random.PCG64([self._seed, self.length, number]))
                epochs.append(pack_whole(offsets, random.permutation(len(offsets) - 1), self.length))
            if ordinal < len(epochs[number]):
                return epochs[number][ordinal]
            ordinal, number = ordinal - len(epochs[number]), number + 1
