"""How the paged reference pads its products; what it gives is held by tests/contract/test_paged_decoders.py."""

from __future__ import annotations

from persimmon.infer.block_cache import TILE, padded_keys


def test_padded_keys_grow_in_few_sizes() -> None:
    sizes = [padded_keys(position) for position in range(2048)]
    assert all(size > position for position, size in enumerate(sizes))
    assert sorted(set(sizes)) == [2 * TILE, 64, 128, 256, 512, 1024, 1536, 2048]
