"""Messages between the server and its engine's process arrive whole and in order, however the bytes were cut."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from persimmon.serve.channel import EngineEnd, ServerEnd, _framed, _Frames
from persimmon.serve.event_loop import new_event_loop

MESSAGES: list[Any] = ["", {"a": 1}, "x" * 70_000, (1, None), b"\0" * 9]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100_000])
def test_messages_do_not_depend_on_the_cut(size: int) -> None:
    data, frames, found = b"".join(map(_framed, MESSAGES)), _Frames(), []
    for start in range(0, len(data), size):
        found += frames.feed(data[start : start + size])
    assert found == MESSAGES


async def exchange() -> tuple[list[Any], list[Any]]:
    """(what the server's end got, what the engine's end got) of an engine that echoes until the server closes."""
    ours, theirs = socket.socketpair()
    got: list[Any] = []
    taken: list[Any] = []
    whole, ended = asyncio.Event(), asyncio.Event()

    def take(message: Any) -> None:
        got.append(message)
        if len(got) == len(MESSAGES):
            whole.set()

    def echo() -> None:
        engine = EngineEnd(theirs)
        while len(taken) < len(MESSAGES):
            taken.extend(engine.receive(wait=True))
        assert engine.receive(wait=False) == []
        for message in taken:
            engine.send(message)
        with pytest.raises((EOFError, ConnectionResetError)):
            engine.receive(wait=True)
        theirs.close()

    end = await ServerEnd.open(ours, take, ended.set)
    thread = threading.Thread(target=echo)
    thread.start()
    for message in MESSAGES:
        end.send(message)
    await asyncio.wait_for(whole.wait(), 30)
    end.close()
    await asyncio.wait_for(ended.wait(), 30)
    end.send("nobody takes this")
    await asyncio.to_thread(thread.join, 30)
    return got, taken


@pytest.mark.parametrize("loop_factory", [new_event_loop, asyncio.new_event_loop])
def test_both_ends_get_what_was_sent(loop_factory: Any) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(exchange()) == (MESSAGES, MESSAGES)


@pytest.mark.parametrize("loop_factory", [new_event_loop, asyncio.new_event_loop])
def test_an_engine_that_reads_nothing_does_not_hold_up_the_loop_and_its_end_is_noticed(loop_factory: Any) -> None:
    async def fill() -> None:
        ours, theirs = socket.socketpair()
        ended = asyncio.Event()
        end = await ServerEnd.open(ours, lambda message: None, ended.set)
        for _ in range(100):
            end.send(b"x" * 100_000)
        await asyncio.sleep(0)
        assert not ended.is_set()
        theirs.close()
        await asyncio.wait_for(ended.wait(), 30)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(fill())
