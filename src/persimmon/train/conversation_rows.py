"""Conversations as rows: encoded with their loss mask, packed whole, reshuffled and repacked every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persimmon import chat
from persimmon.chat import Message
from persimmon.data.packing import Row
from persimmon.errors import DataError
from persimmon.tokenizer import Tokenizer
from persimmon.train.loss import IGNORE


@dataclass(frozen=True)
class EncodedConversation:
    """Inputs and targets of one conversation; targets outside the answers are IGNORE."""

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    answer_bytes: int

    @property
    def teaches(self) -> bool:
        """Whether any target carries loss."""
        return bool((self.targets != IGNORE).any())


Item = tuple[EncodedConversation, ...]
"""Conversations that share a row: one, or the two of a preference."""


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], limit: int) -> EncodedConversation:
    """Tokenize for training, cut behind `limit` positions."""
    ids, mask = chat.encode_for_training(tokenizer, messages)
    inputs = np.asarray(ids[:-1][:limit], dtype=np.int64)
    targets = np.where(mask[1:], ids[1:], IGNORE)[:limit].astype(np.int64)
    size = sum(len(tokenizer.piece_bytes(int(i))) for i in targets if i != IGNORE)
    return EncodedConversation(inputs, targets, size)


def first_fit(sizes: Sequence[int], length: int, open_rows: int = 64) -> list[list[int]]:
    """Put items of the given sizes into rows of `length`, each whole, keeping roughly their order.

    First fit over the newest `open_rows` unfinished rows: deterministic, a few per cent of padding.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (row, free places) of the open rows
    for item, size in enumerate(sizes):
        for slot, (row, free) in enumerate(room):
            if size <= free:
                rows[row].append(item)
                room[slot] = (row, free - size)
                break
        else:
            rows.append([item])
            room = [*room[-(open_rows - 1) :], (len(rows) - 1, length - size)]
    return rows


class ConversationRows:
    """Endless rows of whole items."""

    def __init__(self, items: Sequence[Item], length: int, pad_id: int, seed: int) -> None:
        if not items:
            raise DataError("no conversations left for training")
        self._items, self._length, self._pad, self._seed = items, length, pad_id, seed
        self._sizes = [sum(len(part.token_ids) for part in item) for item in items]
        self._epochs: list[list[list[int]]] = []
        self.rows_per_epoch = len(self._epoch(0))

    def _epoch(self, number: int) -> list[list[int]]:
        while len(self._epochs) <= number:
            seeds = [self._seed, len(self._epochs)]
            order = np.random.Generator(np.random.PCG64(seeds)).permutation(len(self._items))
            packed = first_fit([self._sizes[i] for i in order], self._length)
            self._epochs.append([[int(order[i]) for i in row] for row in packed])
        return self._epochs[number]

    def items(self, row: int) -> list[int]:
        """Numbers of the items in row number `row` of the run, in their order."""
        epoch = 0
        while row >= len(self._epoch(epoch)):
            row -= len(self._epoch(epoch))
            epoch += 1
        return self._epoch(epoch)[row]

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run; padding is a document of its own without targets."""
        parts = [part for number in self.items(row) for part in self._items[number]]
        boundaries = [0, *np.cumsum([len(part.token_ids) for part in parts]).tolist()]
        padding = self._length - boundaries[-1]
        ids = np.concatenate([*(part.token_ids for part in parts), np.full(padding, self._pad)])
        targets = np.concatenate([*(part.targets for part in parts), np.full(padding, IGNORE)])
        return Row(ids, targets, boundaries + [self._length] * (padding > 0), "chat")


def row_seeds(seed: int, step: int, rows: Sequence[int]) -> tuple[int, ...]:
    """A seed for every row of a step: what is random about a row follows from these three numbers alone."""
    return tuple(int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> 1) for row in rows)
