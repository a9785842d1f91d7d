"""The load generator against a real server, and what is read off that server."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator

import pytest

from persimmon.bench.load import Load, Outcome, _ask, _ChunkedBody, address_of, run_load
from persimmon.bench.serve import Level, ServeWork, Target, measure_levels
from persimmon.bench.servers import RssWatch, cache_share_held, free_port, is_ready, parse_cache_share, tree_rss_bytes
from persimmon.errors import InputError, UnavailableError
from served import Server, running

PROMPTS = [[1, 5, 7], [1, 9]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


def load_of(**changes: object) -> Load:
    return Load(**{"clients": 2, "seconds": 1.5, "prompts": PROMPTS, "max_tokens": 6, "model": "tiny", **changes})


def test_clients_stream_answers_until_time_is_up(server: Server) -> None:
    address = address_of(server.url)
    outcome = run_load(address, load_of())
    assert outcome.errors == [] and outcome.finished > 0 and outcome.dropped == 0
    assert outcome.tokens >= outcome.finished  # an end-of-text token alone is a token too
    assert outcome.tokens <= 6 * (outcome.finished + 2)
    assert len(outcome.first_token) <= outcome.finished + 2
    assert outcome.seconds > 1.4 and outcome.tokens_per_second == outcome.tokens / outcome.seconds
    server.wait_idle()
    assert cache_share_held(address) == 0.0


def test_clients_that_leave_are_counted_and_leave_nothing_behind(server: Server) -> None:
    outcome = run_load(address_of(server.url), load_of(disconnects=1.0, max_tokens=200, clients=4))
    assert outcome.dropped > 0 and outcome.errors == []
    server.wait_idle()
    assert cache_share_held(address_of(server.url)) == 0.0


def test_a_refusal_is_an_error_with_its_words(server: Server) -> None:
    outcome = run_load(address_of(server.url), load_of(prompts=[[1, 999_999]], seconds=0.3))
    assert outcome.tokens == 0 and any("status 4" in error and "999999" in error for error in outcome.errors)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n\n', "without [DONE]"),
        (b'data: {"error": {"message": "lost"}}\n\n', "lost"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(event: bytes, words: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        chunk = b"%x\r\n%s\r\n" % (len(event), event)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def ask() -> None:
        port = free_port()
        async with await asyncio.start_server(answer, "127.0.0.1", port):
            with pytest.raises(ValueError, match=re.escape(words)):
                await _ask(address_of(f"http://127.0.0.1:{port}"), {}, None, Outcome())

    asyncio.run(ask())


def test_a_server_that_is_not_there_is_an_error() -> None:
    target = Target("nobody", address_of(f"http://127.0.0.1:{free_port()}"))
    work = ServeWork((1,), 1, load_of(seconds=0.2))
    assert not is_ready(target.address)
    with pytest.raises(UnavailableError, match="nobody answered nothing to 1 clients: ConnectionRefusedError"):
        measure_levels(target, None, work)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_a_chunked_body_does_not_depend_on_the_cut(size: int) -> None:
    data, body = b"3\r\nabc\r\n10\r\n0123456789\r\n\r\n\r\n\r\n0\r\n\r\n", _ChunkedBody()
    parts = [body.feed(data[start : start + size]) for start in range(0, len(data), size)]
    assert b"".join(parts) == b"abc0123456789\r\n\r\n\r\n"[: 3 + 16] and body.ended


def test_levels_take_turns(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from persimmon.bench import serve

    asked: list[tuple[int, int, float]] = []

    def fake(address: object, load: Load) -> Outcome:
        asked.append((address.port, load.clients, load.seconds))
        return Outcome(seconds=2.0, tokens=10 if address.port == 1 else 5)

    monkeypatch.setattr(serve, "run_load", fake)
    ours, peer = (Target(name, address_of(f"http://h:{port}")) for name, port in (("us", 1), ("peer", 2)))
    mine, theirs = measure_levels(ours, peer, ServeWork((1, 4), 2, load_of(seconds=9.0)))
    assert asked[:2] == [(1, 1, serve.WARM_UP_SECONDS), (2, 1, serve.WARM_UP_SECONDS)]
    assert [(port, clients) for port, clients, _ in asked[2:]] == [(1, 1), (2, 1)] * 2 + [(1, 4), (2, 4)] * 2
    assert [level.rates.median for level in (*mine, *theirs)] == [5.0, 5.0, 2.5, 2.5]


def test_a_level_sums_up_all_its_runs() -> None:
    first = Outcome(1.0, 10, 2, 0, [], [0.1, 0.2], [0.01, 0.02, 0.03])
    second = Outcome(2.0, 40, 3, 1, ["OSError: gone"], [0.3], [])
    facts = Level(4, [first, second]).facts()
    assert facts["tokens_per_second"] == 15.0 and facts["runs"] == [10.0, 20.0]
    assert (facts["requests_finished"], facts["requests_dropped"], facts["errors"]) == (5, 1, 1)
    assert (facts["first_token_seconds_p50"], facts["inter_token_seconds_p95"]) == (0.2, 0.03)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "https://h:1", "http://h", "http://h:1/v1", "http://h:x"])
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(InputError, match="http://HOST:PORT"):
        address_of(url)


@pytest.mark.parametrize("changes", [{"clients": 0}, {"seconds": 0}, {"max_tokens": -1}, {"disconnects": 1.5}])
def test_loads_are_checked(changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        load_of(**changes)


def test_memory_of_a_process_and_its_children_is_watched() -> None:
    own = tree_rss_bytes(os.getpid())
    assert own > 10_000_000 and tree_rss_bytes(2**22 + 1) == 0
    with RssWatch(os.getpid()) as watch:
        asyncio.run(asyncio.sleep(0.01))
    assert watch.samples and watch.samples[-1] > 10_000_000


def test_the_gauge_of_the_cache_is_found() -> None:
    page = '# HELP x\npersimmon_kv_cache_usage_perc{model_name="mini"} 0.125\nother 3\n'
    assert parse_cache_share(page) == 0.125
    assert parse_cache_share("other 3\n") is None
