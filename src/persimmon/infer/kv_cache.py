"""Keys and values of earlier tokens: one contiguous cache per sequence, and several of them in one forward pass.

Shapes as in model.py: T new tokens, S stored keys, N heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError, InputError

_FIRST_ALLOCATION = 256
"""Tokens of the first allocation; it doubles from there, so that short sequences stay small and long ones cheap."""


class KVCache:
    """The keys and values of one sequence: per layer [N, allocated, D], grown by doubling up to `capacity`."""

    def __init__(self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        if not 1 <= capacity <= config.max_positions:
            raise ContextLengthError(f"a sequence of {capacity} tokens: the model has 1 to {config.max_positions}")
        self.capacity = capacity
        self.length = 0
        self.device = device
        empty = torch.empty(config.num_heads, 0, config.head_dim, dtype=dtype, device=device)
        self._keys = [empty] * config.num_layers
        self._values = [empty] * config.num_layers

    @property
    def num_bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(store.nbytes for store in self._keys + self._values)

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens; the memory stays for what comes next."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate {self.length} stored tokens to {length}")
        self.length = length

    def close(self) -> None:
        """Give the memory back; appending afterwards is refused."""
        self._keys, self._values = [], []
        self.length = self.capacity = 0

    def saved(self, layer: int, length: int) -> NDArray[np.uint8]:
        """Keys, then values of the first `length` tokens, each [N, length, D], as bytes."""
        stores = (self._keys[layer], self._values[layer])
        parts = [store[:, :length].contiguous().cpu().flatten().view(torch.uint8).numpy() for store in stores]
        return np.concatenate(parts)

    def restore(self, length: int, saved_length: int, layers: Iterable[NDArray[np.uint8]]) -> None:
        """Hold the first `length` tokens of what `saved` gave for `saved_length`, layer by layer."""
        self.truncate(0)
        self.reserve(length)
        for keys, values, data in zip(self._keys, self._values, layers, strict=True):
            heads, _, dim = keys.shape
            if data.nbytes != 2 * heads * saved_length * dim * keys.element_size():
                raise InputError(f"{data.nbytes} bytes are not the keys and values of {saved_length} tokens")
            both = torch.from_numpy(data.copy()).view(keys.dtype).view(2, heads, saved_length, dim)
            keys[:, :length], values[:, :length] = both[0, :, :length], both[1, :, :length]
        self.length = length

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many more tokens; raises ContextLengthError, and changes nothing, when they do not fit."""
        if not self._keys:
            raise InputError("the sequence is closed")
        needed = self.length + num_tokens
        if needed > self.capacity:
            raise ContextLengthError(
                f"{num_tokens} more tokens do not fit: {self.length} of {self.capacity} positions are taken"
            )
        # One tensor at a time: never two copies of everything, and an interrupt in between leaves all usable.
        for stores in (self._keys, self._values):
            for layer, store in enumerate(stores):
                if store.shape[1] < needed:
                    stores[layer] = self._grown(store, needed)

    def _grown(self, store: Tensor, needed: int) -> Tensor:
        """A copy of [N, allocated, D] with room for `needed` tokens or more."""
        heads, allocated, dim = store.shape
        size = min(self.capacity, max(needed, 2 * allocated, _FIRST_ALLOCATION))
        larger = store.new_empty(heads, size, dim)
        larger[:, : self.length] = store[:, : self.length]
        return larger

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [N, T, D] behind the earlier ones; every query sees all up to its own: [N, T, D]."""
        end = self.length + q.shape[1]
        self._keys[layer][:, self.length : end] = k
        self._values[layer][:, self.length : end] = v
        return _attend(q[None], self._keys[layer][None, :, :end], self._values[layer][None, :, :end])[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last T of S positions attend causally to all S: [1, N, T, D]. A single one sees everything."""
    queries, keys = q.shape[2], k.shape[2]
    mask = causal_lower_right(queries, keys) if queries > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CacheBatch:
    """`model.Cache` over the new tokens of several sequences laid end to end in one row.

    Everything but attention then runs over one [1, T] row of tokens, whatever the lengths; attention goes sequence
    by sequence.
    """

    def __init__(self, caches: Sequence[KVCache], sizes: Sequence[int]) -> None:
        """New tokens per cache; the caches have reserved the room."""
        self._caches = list(caches)
        self._sizes = list(sizes)

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Positions [1, T]: every sequence counts on from its own length."""
        assert num_rows == 1 and num_tokens == sum(self._sizes), "one row with the tokens of all sequences"
        ranges = [torch.arange(c.length, c.length + n) for c, n in zip(self._caches, self._sizes, strict=True)]
        return torch.cat(ranges)[None].to(self._caches[0].device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each sequence's part of q, k, v [1, N, T, D] against its own cache."""
        parts = zip(self._caches, *(x[0].split(self._sizes, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([cache.attend(layer, *part) for cache, *part in parts], dim=1)[None]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens as stored."""
        for cache, size in zip(self._caches, self._sizes, strict=True):
            cache.length += size
