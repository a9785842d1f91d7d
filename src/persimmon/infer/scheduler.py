"""Which tokens of which requests run next. Knows token counts and blocks, no tensors and no text.

Every step runs a limited number of tokens: one for each request that is answering, and the rest of the budget
shared equally by the requests whose prompts are still being read. Requests are admitted strictly in the order they
came; when the cache is full, the newest running one gives its blocks back and later goes on where it was (what it
had computed stays in the cache as long as nobody needs the room). The oldest is never sent back, so every request
ends.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from persimmon.errors import ContextLengthError
from persimmon.infer.blocks import BlockAllocator, BlockTable, Copy, common_prefix


@dataclass(eq=False)
class ScheduledRequest:
    """One request as the scheduler sees it. The engine appends to `token_ids` what it samples."""

    token_ids: list[int]
    """Prompt and answer so far."""
    max_length: int
    """Most tokens it can ever store."""
    reuse: bool = True
    """May take keys and values from the cache; not when the logits of the whole prompt are wanted."""
    num_computed: int = 0
    """Leading tokens whose keys and values are stored."""
    num_cached: int = 0
    """Of these, the tokens found in the cache when it was first admitted."""
    table: BlockTable = field(default_factory=BlockTable)
    arrival: int = -1
    num_preemptions: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens still to run before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed


class Work(NamedTuple):
    """Tokens [start, end) of a request."""

    request: ScheduledRequest
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """The next token can be sampled behind it."""
        return self.end == len(self.request.token_ids)


@dataclass
class Step:
    """What runs in one pass of the model."""

    copies: list[Copy] = field(default_factory=list)
    """Blocks to copy before, in this order."""
    work: list[Work] = field(default_factory=list)


class Scheduler:
    """Waiting and running requests, and the blocks they hold."""

    def __init__(self, blocks: BlockAllocator, *, max_running: int, step_tokens: int) -> None:
        """At most `max_running` requests at once and `step_tokens` tokens per step."""
        assert 0 < max_running <= step_tokens, "each running request gets at least one token per step"
        self._blocks = blocks
        self._max_running, self._step_tokens = max_running, step_tokens
        self._arrivals = itertools.count()
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: list[ScheduledRequest] = []  # in order of arrival
        self.prompt_tokens_queried = 0
        self.prompt_tokens_found = 0
        self.num_preemptions = 0

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self._blocks.num_blocks * self._blocks.block_size

    def add(self, request: ScheduledRequest) -> None:
        """Queue a request; ContextLengthError when it could never fit, even alone."""
        if request.max_length > self.capacity:
            raise ContextLengthError(
                f"prompt and answer of up to {request.max_length} tokens: the cache holds {self.capacity}"
            )
        request.arrival = next(self._arrivals)
        self.waiting.append(request)

    def remove(self, request: ScheduledRequest) -> None:
        """The request has ended or was cancelled: its blocks are free at once."""
        if request in self.running:
            self.running.remove(request)
            self._blocks.release(request.table, request.token_ids, request.num_computed)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> Step:
        """Choose the work of the next step; report it back with `advance`."""
        step = Step()
        if self._make_room():
            self._admit(step)
        self._share_budget(step)
        return step

    def advance(self, work: Work) -> None:
        """The work has run. Tokens that are sampled behind it are appended after this."""
        work.request.num_computed = work.end
        self._blocks.commit(work.request.table, work.request.token_ids, work.end)

    def _make_room(self) -> bool:
        """A block for every running request that is about to need one; False when some had to go back."""
        preempted, checked = False, 0
        while checked < len(self.running):
            if self._has_room(self.running[checked]):
                checked += 1
            else:
                preempted = True
                self._preempt(self.running[-1])
        return not preempted

    def _has_room(self, request: ScheduledRequest) -> bool:
        held = len(request.table.blocks)
        return self._blocks.blocks_for(len(request.token_ids)) <= held or self._blocks.grow(request.table)

    def _preempt(self, request: ScheduledRequest) -> None:
        """Back to the head of the queue, with all its tokens and no blocks."""
        self.running.remove(request)
        self._blocks.release(request.table, request.token_ids, request.num_computed)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _admit(self, step: Step) -> None:
        """Take waiting requests in their order while there is room for their whole text."""
        while self.waiting and len(self.running) < self._max_running:
            request = self.waiting[0]
            if request.reuse and self._prefix_is_coming(request):
                return
            # One block in reserve for each running request, or the newcomer would soon be sent back.
            acquired = self._blocks.acquire(request.token_ids, reuse=request.reuse, spare=len(self.running))
            if acquired is None:
                return
            request.table, request.num_computed = acquired.table, acquired.num_cached
            if not request.num_preemptions:
                request.num_cached = acquired.num_cached
                self.prompt_tokens_queried += len(request.token_ids)
                self.prompt_tokens_found += acquired.num_cached
            if acquired.copy is not None:
                step.copies.append(acquired.copy)
            self.running.append(self.waiting.popleft())

    def _prefix_is_coming(self, request: ScheduledRequest) -> bool:
        """A running request is just computing blocks that this one could share: wait for them."""
        size, cached = self._blocks.block_size, None
        for other in self.running:
            if other.num_pending <= 1:
                continue
            shared = common_prefix(other.token_ids, request.token_ids[:-1]) // size * size
            if shared > other.num_computed:
                cached = self._blocks.cached_tokens(request.token_ids) if cached is None else cached
                if shared > cached:
                    return True
        return False

    def _share_budget(self, step: Step) -> None:
        """One token for each answering request; equal shares of the rest for prompts, short ones first."""
        reading = [(r, pending) for r in self.running if (pending := r.num_pending) > 1]
        budget = self._step_tokens - (len(self.running) - len(reading))
        sizes = share(budget, reading) if reading else {}
        for request in self.running:
            start = request.num_computed
            step.work.append(Work(request, start, start + sizes.get(request, 1)))


def share(budget: int, needs: Sequence[tuple[ScheduledRequest, int]]) -> dict[ScheduledRequest, int]:
    """Divide a budget equally; what one does not need goes to the others."""
    sizes: dict[ScheduledRequest, int] = {}
    ordered: Iterable[tuple[ScheduledRequest, int]] = sorted(needs, key=lambda item: item[1])
    for index, (request, need) in enumerate(ordered):
        sizes[request] = min(need, budget // (len(needs) - index))
        budget -= sizes[request]
    return sizes
