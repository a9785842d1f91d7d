"""The fixed buffers of a batch bucket, which a captured step reads and writes, and how a batch gets into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon.fast.cuda.kernels.sampling import SamplingState, sample
from persimmon.fast.cuda.pool import follow_each_other
from persimmon.infer.drawing import Picked
from persimmon.infer.params import SamplingParams

MOST_STEPS = 1_024
"""Tokens that one `decode` call may draw per row: the room of its output buffer."""

_ALIGNED = 16
"""Entries of a table row are a multiple: Triton compiles a kernel anew for arrays or strides that are less aligned."""


Banned: TypeAlias = NDArray[np.int64] | Sequence[int]
"""Ids that are never picked."""


def table_width(blocks: int) -> int:
    """Entries of a table row for that many blocks."""
    return -(-blocks // _ALIGNED) * _ALIGNED


class Tables:
    """Block tables of a bucket's rows. Only rows that changed cross to the device: sequences keep their blocks."""

    def __init__(self, rows: int, width: int, scratch: int, device: torch.device) -> None:
        self.tensor = torch.full((rows, width), scratch, dtype=torch.int32, device=device)
        self._scratch = scratch
        self._held: list[list[int]] = [[] for _ in range(rows)]
        self._jumps = [False] * rows
        self.rows_sent = 0
        """Table rows that were copied to the device so far."""

    @property
    def paged(self) -> bool:
        """Whether blocks of any row do not follow each other, so that they must be looked up."""
        return any(self._jumps)

    def put(self, blocks: Sequence[Sequence[int]]) -> None:
        """The blocks of a batch's rows; the rows behind them are padding, in the scratch block."""
        changed: list[int] = []
        for row, held in enumerate(self._held):
            wanted: Sequence[int] = blocks[row] if row < len(blocks) else ()
            if len(wanted) != len(held) or list(wanted) != held:
                self._held[row], self._jumps[row] = list(wanted), not follow_each_other(wanted)
                changed.append(row)
        if not changed:
            return
        rows = np.full((len(changed), self.tensor.shape[1]), self._scratch, np.int32)
        for place, row in enumerate(changed):
            rows[place, : len(self._held[row])] = self._held[row]
        device = self.tensor.device
        self.tensor.index_copy_(0, torch.tensor(changed, device=device), torch.from_numpy(rows).to(device))
        self.rows_sent += len(changed)


class Shared:
    """What all buckets have in common, as one step runs at a time: logits of the largest, and banned ids."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.logits = torch.zeros(rows, vocabulary, device=device)
        self.banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._whose: object = None  # the array of ids that the mask was made of

    def ban(self, banned: Banned) -> None:
        """Ids that are never drawn. An array is taken for unchanged when it comes again."""
        if banned is self._whose:
            return
        mask = np.zeros(self.banned.shape[0], bool)
        mask[np.asarray(banned, np.int64)] = True
        self.banned.copy_(torch.from_numpy(mask))
        self._whose = banned if isinstance(banned, np.ndarray) else None


class Buffers:
    """The buffers of a bucket, and what a step leaves in them."""

    def __init__(self, rows: int, width: int, shared: Shared, scratch: int, device: torch.device) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.size = rows
        self.ids, self.positions = ints(rows), ints(rows)
        self.rows = torch.arange(rows, dtype=torch.int32, device=device)
        self.tables = Tables(rows, width, scratch, device)
        self.outputs = ints(rows, MOST_STEPS)
        self.logits, self.banned = shared.logits[:rows], shared.banned
        self.unusable = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows whose logits hold no number that could be picked."""
        self.sampling = SamplingState.room_for(rows, device)

    def idle(self) -> None:
        """A state in which running the step harms nothing: all rows are padding."""
        self.tables.put([])
        self.fill([], [])
        self.sample_with([], [], [])

    def fill(self, ids: Sequence[int], positions: Sequence[int]) -> None:
        """The new tokens of a batch; the rest is padding, at position 0."""
        padding = self.size - len(ids)
        numbers = torch.tensor([[*ids, *[0] * padding], [*positions, *[0] * padding]], dtype=torch.int32)
        self.ids.copy_(numbers[0], non_blocking=True)
        self.positions.copy_(numbers[1], non_blocking=True)

    def sample_with(self, params: Sequence[SamplingParams], seeds: Sequence[int], drawn: Sequence[int]) -> None:
        """What the rows ask for; padding is greedy and does not move on."""
        state, vocabulary = self.sampling, self.logits.shape[1]
        columns: dict[str, list[float] | list[int]] = {
            "temperature": [p.temperature for p in params],
            "top_k": [p.top_k if p.top_k < vocabulary else 0 for p in params],
            "top_p": [p.top_p for p in params], "min_p": [p.min_p for p in params],
            "seed": [seed % 2**63 for seed in seeds], "count": list(drawn), "truncated": [0] * len(params),
            "live": [1] * len(params),
        }  # fmt: skip
        for name, values in columns.items():
            target: Tensor = getattr(state, name)
            padding = [1 if name == "top_p" else 0] * (self.size - len(values))
            target.copy_(torch.tensor([*values, *padding], dtype=target.dtype))

    def sample(self, *, filters: bool) -> None:
        """The next tokens of the logits, and which rows have none that could be picked."""
        self.logits.masked_fill_(self.banned, float("-inf"))
        torch.logical_not(torch.isfinite(self.logits.amax(1)), out=self.unusable)
        sample(self.logits, self.sampling, self.ids, self.positions, self.outputs, filters=filters)

    def fetch(self, count: int) -> list[Picked]:
        """Drawn tokens of the first rows in one copy; logits where the host has to look: a cut nucleus, no number."""
        host = torch.stack([self.ids[:count], self.sampling.truncated[:count] + self.unusable[:count]]).tolist()
        return [
            token if not unsure else self.logits[row].to("cpu", copy=True).numpy()
            for row, (token, unsure) in enumerate(zip(*host, strict=True))
        ]
