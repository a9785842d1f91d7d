"""Bytes of the tensors that exist: every storage that a torch operation makes is counted until it is gone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """`peak` is the most bytes that tensors made inside the block held at one time; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._inputs: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs or {})):
            self._ignore(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self._count(tensor.untyped_storage())
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]

    def _ignore(self, storage: torch.UntypedStorage) -> None:
        """A storage that was there before the block: the model's, or the batch's."""
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._inputs.append(storage)  # kept, so that its address stays its own

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
