"""Runs of n words of a text as one 64-bit number each: what duplicates and overlaps are found by."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")

# An odd number near 2^64 / golden ratio: the multiplier of Fibonacci hashing (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CACHED_WORDS = 1 << 18


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: punctuation, layout and case do not count."""
    return _WORD.findall(text.lower())


@lru_cache(maxsize=_CACHED_WORDS)
def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all others (the finalizer of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(words: list[str], n: int) -> NDArray[np.uint64]:
    """One number per run of `n` words, in order; none for a shorter text. [len(words) - n + 1]."""
    if len(words) < n:
        return np.empty(0, dtype=np.uint64)
    numbers = np.fromiter((_number(word) for word in words), dtype=np.uint64, count=len(words))
    count = len(words) - n + 1
    total = np.zeros(count, dtype=np.uint64)
    for place in range(n):  # a polynomial in the multiplier, modulo 2^64: order matters
        total = total * _MULTIPLIER + numbers[place : place + count]
    return mix(total)
