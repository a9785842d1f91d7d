"""The fingerprint notices damage, and every instruction set computes the same one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_layouts import ISAS
from persimmon.fast.cpu import _native


@settings(max_examples=100)
@given(data=st.binary(min_size=1, max_size=400), where=st.integers(0, 399), bit=st.integers(0, 7))
def test_any_flipped_bit_changes_it(data: bytes, where: int, bit: int) -> None:
    original = np.frombuffer(data, np.uint8)
    damaged = original.copy()
    damaged[where % len(data)] ^= 1 << bit
    assert _native.fingerprint(original) != _native.fingerprint(damaged)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_instruction_sets_agree_and_length_counts(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert len({_native.fingerprint(data, isa) for isa in ISAS}) == 1
    assert _native.fingerprint(data) != _native.fingerprint(np.append(data, np.uint8(0)))


def test_swapped_pieces_change_it() -> None:
    data = np.arange(128, dtype=np.uint8)
    assert _native.fingerprint(data) != _native.fingerprint(np.concatenate([data[64:], data[:64]]))
