"""The scheduler against a made-up cache that remembers which text every slot was computed from."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from persimmon.errors import ContextLengthError
from persimmon.infer.blocks import BlockAllocator
from persimmon.infer.scheduler import ScheduledRequest, Scheduler, Step, Work, share


class Harness:
    """Plays the engine: stores for every slot the text up to its token, checks it when it is relied on."""

    def __init__(self, num_blocks: int, block_size: int, max_running: int, step_tokens: int) -> None:
        self.blocks = BlockAllocator(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_running=max_running, step_tokens=step_tokens)
        self.slots: dict[int, list[tuple[int, ...] | None]] = {b: [None] * block_size for b in range(num_blocks)}
        self.goals: dict[ScheduledRequest, int] = {}
        self.admitted: list[ScheduledRequest] = []
        self.finished: list[ScheduledRequest] = []
        self.step_tokens, self.max_running = step_tokens, max_running
        self.tokens_run = 0

    def add(self, token_ids: list[int], num_answer: int, *, reuse: bool = True) -> ScheduledRequest:
        request = ScheduledRequest(list(token_ids), len(token_ids) + num_answer, reuse)
        self.scheduler.add(request)
        self.goals[request] = len(token_ids) + num_answer
        return request

    def cancel(self, request: ScheduledRequest) -> None:
        self.scheduler.remove(request)
        del self.goals[request]

    def step(self) -> Step:
        before = set(self.scheduler.running)
        step = self.scheduler.schedule()
        self.admitted += [r for r in self.scheduler.running if r not in before]
        for source, target in step.copies:
            self.slots[target] = list(self.slots[source])
        assert sum(w.end - w.start for w in step.work) <= self.step_tokens
        for work in step.work:
            self._run(work)
        return step

    def _run(self, work: Work) -> None:
        request, size = work.request, self.blocks.block_size
        text = tuple(request.token_ids)
        assert work.start < work.end, "every running request gets on"
        for position in range(work.start):
            stored = self.slots[request.table.blocks[position // size]][position % size]
            assert stored == text[: position + 1], "what is shared was computed from the same text"
        for position in range(work.start, work.end):
            block = request.table.blocks[position // size]
            assert self.blocks.holders(block) == 1, "nobody writes into a shared block"
            self.slots[block][position % size] = text[: position + 1]
        self.tokens_run += work.end - work.start
        samples = work.samples
        self.scheduler.advance(work)
        if samples:
            request.token_ids.append(sum(text) % 3)
            if len(request.token_ids) >= self.goals[request]:
                self.scheduler.remove(request)
                self.finished.append(request)
                del self.goals[request]

    def run(self, most_steps: int = 10_000) -> None:
        for _ in range(most_steps):
            if not self.goals:
                return
            self.step()
        raise AssertionError("requests are left over")

    def check(self) -> None:
        held = [b for r in self.scheduler.running for b in r.table.blocks]
        for block in range(self.blocks.num_blocks):
            assert self.blocks.holders(block) == held.count(block)
        assert self.blocks.num_held == len(set(held))
        arrivals = [r.arrival for r in self.scheduler.running] + [r.arrival for r in self.scheduler.waiting]
        assert arrivals == sorted(arrivals), "nobody overtakes"
        assert len(self.scheduler.running) <= self.max_running
        assert all(not r.table.blocks for r in self.scheduler.waiting)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Serving(RuleBasedStateMachine):
    """Requests come, go and grow in any order, over a cache that is too small for them."""

    @initialize(
        num_blocks=st.integers(3, 12),
        block_size=st.integers(1, 4),
        max_running=st.integers(1, 5),
        extra=st.integers(0, 9),
    )
    def start(self, num_blocks: int, block_size: int, max_running: int, extra: int) -> None:
        self.harness = Harness(num_blocks, block_size, max_running, max_running + extra)

    @rule(prompt=prompts, num_answer=st.integers(1, 8), reuse=st.booleans())
    def add(self, prompt: list[int], num_answer: int, reuse: bool) -> None:
        if len(prompt) + num_answer > self.harness.scheduler.capacity:
            with pytest.raises(ContextLengthError, match="the cache holds"):
                self.harness.scheduler.add(ScheduledRequest(prompt, len(prompt) + num_answer))
        else:
            self.harness.add(prompt, num_answer, reuse=reuse)

    @precondition(lambda self: self.harness.goals)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.harness.cancel(data.draw(st.sampled_from(list(self.harness.goals))))

    @rule()
    def step(self) -> None:
        self.harness.step()

    @precondition(lambda self: self.harness.finished)
    @rule(data=st.data(), more=prompts)
    def continue_a_finished_text(self, data: st.DataObject, more: list[int]) -> None:
        text = [*data.draw(st.sampled_from(self.harness.finished)).token_ids, *more]
        if len(text) < self.harness.scheduler.capacity:
            self.harness.add(text, 1)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.check()
            assert self.harness.blocks.num_held == 0
            assert self.harness.blocks.num_available == self.harness.blocks.num_blocks


Serving.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestServing = Serving.TestCase


def test_first_admissions_follow_arrivals_whatever_the_sizes() -> None:
    harness = Harness(num_blocks=8, block_size=4, max_running=4, step_tokens=8)
    requests = [harness.add([n] * length, 4) for n, length in enumerate((20, 1, 25, 2, 3, 28, 1))]
    harness.run()
    first = list(dict.fromkeys(harness.admitted))
    assert first == requests


def test_the_next_turn_computes_only_its_new_tokens() -> None:
    harness = Harness(num_blocks=32, block_size=16, max_running=2, step_tokens=64)
    first = harness.add(list(range(50)), 13)
    harness.run()
    computed = harness.tokens_run
    assert computed == 50 + 13 - 1  # the last token is sampled and never stored
    turn = harness.add([*first.token_ids, *range(100, 121)], 1)
    harness.run()
    assert turn.num_cached == 62
    assert harness.tokens_run - computed == 21 + 1  # the new tokens, and the one that was never stored


def test_equal_prompts_are_read_once() -> None:
    harness = Harness(num_blocks=64, block_size=4, max_running=8, step_tokens=16)
    prompt = list(range(41))
    for _ in range(4):
        harness.add(prompt, 2)
    harness.run()
    assert harness.tokens_run == 41 + 3 * 1 + 4 * 1  # one prompt, its last token again thrice, four second tokens


def test_logits_of_the_whole_prompt_need_the_whole_prompt() -> None:
    harness = Harness(num_blocks=16, block_size=4, max_running=2, step_tokens=16)
    harness.add(list(range(20)), 1)
    harness.run()
    again = harness.add(list(range(20)), 1, reuse=False)
    harness.run()
    assert again.num_cached == 0 and harness.tokens_run == 40


def test_a_full_cache_sends_the_newest_back_and_keeps_the_oldest() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_running=4, step_tokens=8)
    requests = [harness.add([n, n], 12) for n in range(4)]
    harness.run()
    assert requests[0].num_preemptions == 0
    assert sum(r.num_preemptions for r in requests) == harness.scheduler.num_preemptions > 0
    assert harness.finished[0] is requests[0]


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    harness = Harness(num_blocks=64, block_size=8, max_running=4, step_tokens=32)
    harness.add(list(range(400)), 2)
    short = harness.add([7] * 10, 1)
    harness.step()
    assert short in harness.finished


def test_cancelled_requests_free_their_blocks_at_once() -> None:
    harness = Harness(num_blocks=8, block_size=4, max_running=2, step_tokens=8)
    running, waiting = harness.add([1] * 20, 8), harness.add([2] * 20, 8)
    harness.step()
    assert harness.blocks.num_held > 0
    harness.cancel(running)
    assert harness.blocks.num_held == 0
    harness.cancel(waiting)
    assert not harness.scheduler.waiting


def test_shares_are_equal_and_nothing_is_wasted() -> None:
    a, b, c = (ScheduledRequest([0], 1) for _ in range(3))
    assert share(30, [(a, 100), (b, 4), (c, 100)]) == {b: 4, a: 13, c: 13}
    assert share(30, [(a, 3), (b, 4)]) == {a: 3, b: 4}
    assert share(3, [(a, 9), (b, 9), (c, 9)]) == {a: 1, b: 1, c: 1}
