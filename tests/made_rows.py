"""Training rows that depend on (step, row) alone: documents of uneven length, some targets without loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from persimmon.train.loss import IGNORE
from persimmon.train.passes import Batch


class RandomRows:
    """A BatchSource of random ids below 320; text of a small cycle, so that there is something to learn."""

    def __init__(self, rows: int = 6, length: int = 16) -> None:
        self._rows, self._length = rows, length

    def rows(self, step: int) -> int:
        return self._rows

    def row_length(self, step: int) -> int:
        return self._length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        ids, targets, documents = [], [], [0]
        for index, row in enumerate(rows):
            generator = torch.Generator().manual_seed(1000 * step + row)
            stream = torch.randint(0, 320, (self._length + 1,), generator=generator)
            target = stream[1:].clone()
            target[: row % 5] = IGNORE
            ids.append(stream[:-1])
            targets.append(target)
            documents += [index * self._length + 5, (index + 1) * self._length]
        return Batch(torch.stack(ids), torch.stack(targets), documents)
