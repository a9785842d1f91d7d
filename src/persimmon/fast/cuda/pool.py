"""Keys and values of all sequences: one pool of blocks per decoder, on the device from the start.

A captured graph keeps the addresses it was captured with, so the pool never moves or grows: its size is planned before
loading (plan.py). A token is a slot; `block_size` slots are a block; a sequence is a list of blocks. A list of blocks
that follow each other is the static case: the kernels then compute slots instead of looking them up, and a prompt's
attention reads the pool in place.

One block more than asked for is the scratch block: rows of a batch that are only padding read and write there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persimmon.config import ModelConfig
from persimmon.errors import UnavailableError

CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""How keys and values are stored; int8 and fp8 with a float32 scale per token, head, and key or value."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values: [slots, heads, head_dim], and [slots, heads] scales where they are quantized."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None


class Pool:
    """Keys and values of `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, kv_dtype: str, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size, self.kv_dtype = num_blocks, block_size, kv_dtype
        self.scratch = num_blocks
        """The block for padding."""
        shape = ((num_blocks + 1) * block_size, config.num_heads, config.head_dim)
        self.layers = [_layer(shape, kv_dtype, device) for _ in range(config.num_layers)]

    @property
    def num_bytes(self) -> int:
        """Memory of the pool."""
        parts = [t for layer in self.layers for t in (layer.keys, layer.values, *(layer.scales or ()))]
        return sum(t.nbytes for t in parts)

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (source, target) in all layers, in order."""
        size = self.block_size
        for source, target in pairs:
            for layer in self.layers:
                for part in (layer.keys, layer.values, *(layer.scales or ())):
                    part[target * size : (target + 1) * size] = part[source * size : (source + 1) * size]


def _layer(shape: tuple[int, int, int], kv_dtype: str, device: torch.device) -> LayerCache:
    # Zeros: a padding row reads its scratch block before anything was written there.
    keys, values = (torch.zeros(shape, dtype=CACHE_DTYPES[kv_dtype], device=device) for _ in range(2))
    if kv_dtype not in ("int8", "fp8"):
        return LayerCache(keys, values, None)
    k_scales, v_scales = (torch.zeros(shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    return LayerCache(keys, values, (k_scales, v_scales))


def follow_each_other(blocks: Sequence[int]) -> bool:
    """Whether a sequence's blocks are neighbours in ascending order."""
    return len(blocks) < 2 or list(blocks) == list(range(blocks[0], blocks[0] + len(blocks)))


class FreeBlocks:
    """The blocks that no sequence holds; a sequence gets neighbours where it can."""

    def __init__(self, num_blocks: int) -> None:
        self._free = set(range(num_blocks))
        self.num_blocks = num_blocks

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """That many blocks, those behind block `after` first. UnavailableError when there are fewer, and none taken."""
        if count > len(self._free):
            raise UnavailableError(
                f"the key/value cache is full: {count} more blocks are needed, {len(self._free)} of {self.num_blocks} "
                "are free; close sequences, or load with a larger context"
            )
        following = self._start(count) if after is None else after + 1
        taken: list[int] = []
        while len(taken) < count and following in self._free:
            taken.append(following)
            self._free.remove(following)
            following += 1
        for block in sorted(self._free)[: count - len(taken)]:
            taken.append(block)
            self._free.remove(block)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._free.update(blocks)

    def _start(self, count: int) -> int:
        """Where a new sequence begins: at the start of an empty pool, else amid the longest free run, so that it and
        the sequence before it have room to grow without jumps.
        """  # noqa: D205
        start, length = max(self._runs(), key=lambda run: run[1])
        return start if start == 0 else start + max(0, length - count) // 2

    def _runs(self) -> list[tuple[int, int]]:
        """Free blocks as (first, length) of neighbours; at least one, which may be empty."""
        runs: list[tuple[int, int]] = []
        for block in sorted(self._free):
            if runs and sum(runs[-1]) == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs or [(0, 0)]
