"""Blocks of the key-value cache: who holds which, and what the free ones still remember. No torch.

A block holds the keys and values of `block_size` consecutive tokens of a sequence. Blocks that are filled form a tree
over token ids: a node is a block, its path from the root is the whole text before it. A new sequence walks the tree
and shares every full block it finds; from the node where it leaves the tree it copies the part of a block that still
agrees, so that nothing already computed is computed again. Nodes have serial numbers and edges compare token ids
themselves: no hash stands for a text, so no collision can mix two conversations.

Blocks that nobody holds stay in the tree, least recently used first to go.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ROOT = 0
"""Serial number of the empty text."""


@dataclass
class BlockTable:
    """The blocks of one sequence in order, and the tree nodes of those that are filled."""

    blocks: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)


class Copy(NamedTuple):
    """Copy a block before the step runs."""

    source: int
    target: int


class Acquired(NamedTuple):
    """A table with room for a whole text."""

    table: BlockTable
    num_cached: int
    """Leading tokens whose keys and values are there, once `copy` is done."""
    copy: Copy | None


class _Node(NamedTuple):
    """What a block of the tree holds."""

    serial: int
    parent: int
    token_ids: tuple[int, ...]
    """All `block_size` of them, or fewer at the end of a finished text."""


class BlockAllocator:
    """Hands out blocks, shares what is already computed, and takes blocks back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0, "a cache has blocks, and blocks hold tokens"
        self.num_blocks, self.block_size = num_blocks, block_size
        self._holders = [0] * num_blocks
        self._empty = list(range(num_blocks))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the tree, held by nobody, oldest first
        self._nodes: dict[int, _Node] = {}  # by block
        self._children: dict[int, dict[tuple[int, ...], int]] = {}  # node -> token ids -> block
        self._serials = itertools.count(ROOT + 1)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out."""
        return len(self._empty) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_available

    def holders(self, block: int) -> int:
        """Tables that hold the block."""
        return self._holders[block]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def acquire(self, token_ids: Sequence[int], *, reuse: bool = True, spare: int = 0) -> Acquired | None:
        """Blocks for all of `token_ids`, shared where possible; None when fewer than `spare` would be left.

        The last token is never taken from the cache: its logits are wanted. `reuse=False` shares nothing.
        """
        table, source, num_cached = self._match(token_ids) if reuse else (BlockTable(), None, 0)
        for block in table.blocks:  # before anything is taken, so that it cannot be these
            self._hold(block)
        num_new = self.blocks_for(len(token_ids)) - len(table.blocks)
        if num_new + spare > self.num_available:
            for block in reversed(table.blocks):
                self._drop(block)
            return None
        if source is not None and num_new == self.num_available:  # every free block is needed, this one too
            source, num_cached = None, len(table.blocks) * self.block_size
        if source is not None:
            self._hold(source)
        table.blocks += [self._take() for _ in range(num_new)]
        if source is None:
            return Acquired(table, num_cached, None)
        self._drop(source)
        return Acquired(table, num_cached, Copy(source, table.blocks[len(table.nodes)]))

    def grow(self, table: BlockTable) -> bool:
        """One more block at the end of the table; False when there is none."""
        if not self.num_available:
            return False
        table.blocks.append(self._take())
        return True

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` tokens are stored: blocks that are full now can be shared."""
        size = self.block_size
        while (index := len(table.nodes)) < num_computed // size:
            part = tuple(token_ids[index * size : (index + 1) * size])
            table.nodes.append(self._enter(table, index, part))

    def release(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Take the table back; what it stored stays findable, a last partly filled block too."""
        self.commit(table, token_ids, num_computed)
        index, rest = divmod(num_computed, self.block_size)
        if rest:
            self._enter(table, index, tuple(token_ids[num_computed - rest : num_computed]))
        for block in reversed(table.blocks):  # ends of texts go before their beginnings
            self._drop(block)
        table.blocks, table.nodes = [], []

    def cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Leading tokens that `acquire` would find."""
        return self._match(token_ids)[2]

    def _match(self, token_ids: Sequence[int]) -> tuple[BlockTable, int | None, int]:
        """(full blocks that agree, a block whose beginning agrees with what follows, tokens found)."""
        size, last = self.block_size, len(token_ids) - 1
        table, node, found = BlockTable(), ROOT, 0
        while found + size <= last:
            block = self._children.get(node, {}).get(tuple(token_ids[found : found + size]))
            if block is None:
                break
            node, found = self._nodes[block].serial, found + size
            table.blocks.append(block)
            table.nodes.append(node)
        source, agreeing = self._longest_child(node, token_ids[found : min(found + size, last)])
        return table, source, found + agreeing

    def _longest_child(self, node: int, token_ids: Sequence[int]) -> tuple[int | None, int]:
        """The child that shares most leading tokens, and how many."""
        best, most = None, 0
        for tokens, block in self._children.get(node, {}).items():
            agreeing = common_prefix(tokens, token_ids)
            if agreeing > most:
                best, most = block, agreeing
        return best, most

    def _enter(self, table: BlockTable, index: int, token_ids: tuple[int, ...]) -> int:
        """Make a block of the table findable; returns the node of this text, an older one if there is."""
        parent = table.nodes[index - 1] if index else ROOT
        siblings = self._children.setdefault(parent, {})
        if token_ids in siblings:
            return self._nodes[siblings[token_ids]].serial
        block = table.blocks[index]
        assert block not in self._nodes, "a block is entered once"
        self._nodes[block] = _Node(next(self._serials), parent, token_ids)
        siblings[token_ids] = block
        return self._nodes[block].serial

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] += 1

    def _drop(self, block: int) -> None:
        self._holders[block] -= 1
        assert self._holders[block] >= 0, "a block is dropped once per holder"
        if self._holders[block]:
            return
        if block in self._nodes:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def _take(self) -> int:
        """An empty block, or the one longest unused, which is forgotten."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def _forget(self, block: int) -> None:
        """Take a block out of the tree; texts that went on behind it can no longer be found through it."""
        node = self._nodes.pop(block)
        siblings = self._children[node.parent]
        del siblings[node.token_ids]
        if not siblings:
            del self._children[node.parent]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading ids."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
