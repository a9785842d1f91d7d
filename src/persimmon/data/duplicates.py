"""Duplicates: equal texts by their hash, similar ones by MinHash and banding (Broder 1997; Leskovec et al., ch. 3).

A text is the set of its runs of `shingle` words. For each of `bands * rows` seeded hash functions its signature keeps
the smallest value over the set; two texts agree in one place with a probability equal to their Jaccard similarity s.
Texts that agree in all `rows` places of some band are called similar: probability 1 - (1 - s^rows)^bands, with 14 bands
of 8 rows is one half at s = 0.69 and 92 % at 0.8. Similar texts are joined into groups; the first of a group stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from persimmon.data.ngrams import mix, ngram_hashes, words_of

_SEED = 0x5EED  # of the hash functions; part of what a signature means
_BLOCK = 4_096  # shingles at a time: 112 hash functions on them are 3.7 MB


def hash_functions(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Odd factors and summands of `count` multiply-shift hash functions (Dietzfelbinger et al. 1997)."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    factors = random.integers(0, 1 << 63, size=count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, random.integers(0, 1 << 63, size=count, dtype=np.uint64)


def band_hashes(text: str, digest: bytes, *, shingle: int, bands: int, rows: int) -> NDArray[np.uint64]:
    """One number per band, equal for texts that agree in it. A text without a shingle is similar to its equals only."""
    shingles = np.unique(ngram_hashes(words_of(text), shingle))
    if not len(shingles):
        return mix(np.full(bands, int.from_bytes(digest[:8], "little"), dtype=np.uint64))
    factors, summands = hash_functions(bands * rows)
    smallest = np.full(bands * rows, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK, None]
        smallest = np.minimum(smallest, ((block * factors + summands) >> np.uint64(32)).min(axis=0))
    signature = smallest.reshape(bands, rows)
    total = np.arange(bands, dtype=np.uint64)  # the same places in another band are another number
    for row in range(rows):
        total = mix(total * np.uint64(0x9E3779B97F4A7C15) + signature[:, row])
    return total


def first_occurrences(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For every text [documents, 32] the number of the first equal one."""
    keys = np.ascontiguousarray(digests).view("V32").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def pairs_of_band(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(earlier, later) numbers of texts [pairs, 2] that are neighbours among the equal values of one band."""
    order = np.argsort(values, kind="stable")
    same = values[order][1:] == values[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1).astype(np.int64)


def join(count: int, pairs: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """For every text the number of the first of its group, where `pairs` belong together (union-find)."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for block in pairs:
        for one, other in block.tolist():
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    return np.array([root(item) for item in range(count)], dtype=np.int64)
