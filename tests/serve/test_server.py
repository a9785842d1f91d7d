"""The server over HTTP, with the official client and with plain requests: a real process, a real port."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from deadly_engine import build_deadly  # noqa: E402
from served import CONTEXT, Server, running  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402

TOKENIZER = tiny_tokenizer()
HELLO = [{"role": "user", "content": "the story of light"}]
ENDLESS = {"max_tokens": 400, "logit_bias": {"1": -100}}
"""An answer that never picks end-of-text."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 3, **fields})


def content(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_a_chat_whole_and_streamed_is_the_same(client: Any) -> None:
    whole = chat(client)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content(whole)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_async_client_works_and_a_crowd_changes_nothing(server: Server, client: Any) -> None:
    alone = [content(chat(client, seed=n, max_tokens=20)) for n in range(6)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as many:
            create = many.chat.completions.create
            calls = [create(model="tiny", messages=HELLO, max_tokens=20, seed=n) for n in range(6)]
            return [content(answer) for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone


def test_n_choices_differ_and_the_first_is_the_only_one(client: Any) -> None:
    several, single = chat(client, n=3), chat(client)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert content(several) == content(single)
    assert len({choice.message.content for choice in several.choices}) > 1
    assert several.usage.prompt_tokens == single.usage.prompt_tokens


def test_cached_tokens_count_every_prompt(client: Any) -> None:
    def cached(prompt: Any, n: int) -> int:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, n=n, temperature=0)
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    prompts = [[7 + k] * 40 for k in range(2)]
    assert cached(prompts[0], 3) == 0, "the first choice computes it, the others find it"
    alone = cached(prompts[0], 1)
    cached(prompts[1], 1)
    assert alone > 0 and cached(prompts, 2) == 2 * alone


def test_chat_logprobs(client: Any) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1)
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
    chunks = chat(client, logprobs=True, top_logprobs=3, stream=True)
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries


def test_stop_bias_and_penalties(client: Any) -> None:
    free = content(chat(client, temperature=0, max_tokens=30, logit_bias={"1": -100}))
    stop = next(c for c in free[2:] if c.isascii())
    stopped = chat(client, temperature=0, max_tokens=30, stop=[stop], logit_bias={"1": -100})
    assert stopped.choices[0].finish_reason == "stop"
    assert content(stopped) == free[: free.index(stop)]
    biased = chat(client, logit_bias={str(TOKENIZER.encode("b")[0]): 100}, max_tokens=4, presence_penalty=0.1)
    assert content(biased) == "bbbb"
    extras = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    assert content(chat(client, temperature=0.9, extra_body=extras)) == content(
        chat(client, temperature=0.9, extra_body=extras)
    )


def test_constrained_answers(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    for seed in range(3):
        answer = chat(client, max_tokens=300, seed=seed, response_format=form)
        if answer.choices[0].finish_reason == "stop":
            assert json.loads(content(answer))["a"] in ("x", "y")
        picked = chat(client, max_tokens=40, seed=seed, extra_body={"choice": ["a story", "light"]})
        assert content(picked) in ("a story", "light")
    assert content(chat(client, max_tokens=9, extra_body={"regex": "[ab]{3}"})).strip("ab") == ""


def test_completions_with_text_ids_and_lists(client: Any) -> None:
    def complete(prompt: Any, **fields: Any) -> Any:
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
        return client.completions.create(**settings)

    ids = TOKENIZER.encode("the story", bos=True)
    text = complete("the story").choices[0].text
    assert complete(ids).choices[0].text == text
    assert complete([ids, ids[:2]]).choices[0].text == text
    assert [c.index for c in complete(["the story", "a light"], n=2).choices] == [0, 1, 2, 3]
    assert complete("the story", echo=True).choices[0].text == "the story" + text
    assert "".join(c.choices[0].text for c in complete("the story", stream=True, echo=True)) == "the story" + text
    empty = complete("the story", echo=True, max_tokens=0)
    assert empty.choices[0].text == "the story" and empty.usage.completion_tokens == 0


def test_echoed_logprobs_are_what_the_evaluation_harness_sums(client: Any) -> None:
    ids = TOKENIZER.encode("the story of light and a human", bos=True)
    answer = client.completions.create(
        model="tiny", prompt=[ids, ids[:5]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    whole, part = (choice.logprobs for choice in answer.choices)
    for columns, prompt in ((whole, ids), (part, ids[:5])):
        assert len(columns.token_logprobs) == len(prompt) + 1 and columns.token_logprobs[0] is None
        assert len(columns.tokens) == len(columns.top_logprobs) == len(columns.text_offset) == len(prompt) + 1
        for value, top in zip(columns.token_logprobs[1:], columns.top_logprobs[1:], strict=True):
            assert value in top.values()
        assert columns.token_logprobs[-1] == max(columns.top_logprobs[-1].values()), "greedy is the likeliest"
    assert math.isclose(sum(part.token_logprobs[1:5]), sum(whole.token_logprobs[1:5]))


def test_offsets_are_places_in_the_text_whole_and_streamed(client: Any) -> None:
    text = "the 日本 story"
    settings = {"model": "tiny", "prompt": text, "max_tokens": 6, "temperature": 0, "logprobs": 1, "echo": True}
    whole = client.completions.create(**settings).choices[0]
    offsets = whole.logprobs.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert [o for o in offsets if o <= len(text)][-1] == len(text)
    assert offsets.count(text.index("日")) == 3
    chunks = client.completions.create(**settings, stream=True)
    assert [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset] == offsets


def test_models_tokens_and_information(server: Server, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    found = server.http.post("/tokenize", json={"prompt": "the story", "return_token_strs": True}).json()
    assert found["tokens"] == TOKENIZER.encode("the story", bos=True) and found["max_model_len"] == CONTEXT
    assert "".join(found["token_strs"][1:]) == "the story"
    assert server.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == "the story"
    assert server.http.post("/tokenize", json={"messages": HELLO}).json()["count"] == chat(client).usage.prompt_tokens
    assert server.http.get("/tokenizer_info").json()["eos_token"] == "|ENDOFTEXT|"
    assert server.http.get("/ready").json()["engine"] == "reference"


BAD_BODIES: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": HELLO, "tools": []}, 400, "tools", "not trained to call tools"),
    ({"messages": HELLO, "tool_choice": "auto"}, 400, "tool_choice", "not trained to call tools"),
    ({"messages": HELLO, "store": True}, 400, "store", "not kept"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, 400, "tool_calls", "unknown field"),
    ({"messages": HELLO, "frobnicate": 1}, 400, "frobnicate", "unknown field"),
    ({"messages": HELLO, "temperature": "hot"}, 400, "temperature", "number"),
    ({"messages": HELLO, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"messages": HELLO, "repetition_penalty": 5e-324}, 400, "repetition_penalty", "greater than or equal to 0.01"),
    ({"messages": HELLO, "max_new_tokens": 1}, 400, "max_new_tokens", "max_tokens"),
    ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"messages": HELLO, "logit_bias": {"x": 1}}, 400, None, "not a token id"),
    ({"messages": HELLO, "logit_bias": {"99999": 1}}, 400, None, "99999"),
    ({"messages": HELLO, "top_logprobs": 2}, 400, None, "needs logprobs"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, None, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text"),
    ({"messages": HELLO, "model": "gpt"}, 404, "model", "not served here"),
    ({"messages": HELLO, "regex": "(a"}, 400, None, "regex"),
    ({"messages": HELLO, "regex": "a", "choice": ["a"]}, 400, None, "exclude each other"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD_BODIES)
def test_bad_requests_are_told_what_is_wrong(
    server: Server, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    for stream in (False, True):
        answer = server.http.post("/v1/chat/completions", json=body | {"stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param) and words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_not_json(server: Server) -> None:
    bodies = (b"", b"{", b"[" * 50_000, b'"\\ud800"', b"\xff", b"null", b"NaN", b'{"messages":' + b"9" * 6_000 + b"}")
    for body in bodies:
        answer = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:20]
    assert server.http.get("/nothing").status_code == 404
    assert server.http.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"


def test_what_does_not_fit_the_context(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * (CONTEXT + 1), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=CONTEXT)
    assert caught.value.code == "context_length_exceeded"


def test_the_next_turn_reads_only_new_tokens(client: Any) -> None:
    first = chat(client, max_tokens=6, temperature=0, logit_bias={str(TOKENIZER.encode("b")[0]): 100})
    turns = [*HELLO, {"role": "assistant", "content": content(first)}, {"role": "user", "content": "a"}]
    usage = chat(client, messages=turns, max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_a_client_that_goes_away_stops_its_request() -> None:
    body = {"messages": HELLO, "stream": True, "seed": 1, **ENDLESS}  # without a seed some answers stop early
    with running(build_deadly) as slow:  # four seconds at least for an answer
        with slow.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: without a reader the connection is closed
            next(lines)
            assert slow.service.worker.in_flight == 1
        slow.wait_idle()
        logged(slow, "the client closed the connection", 1)
        with pytest.raises(httpx.ReadTimeout):
            early = httpx.post(f"{slow.url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.3)
            raise AssertionError(f"answered at once: {early.status_code} {early.text[:300]}")
        slow.wait_idle()
        logged(slow, "the client closed the connection", 2)


def logged(server: Server, ended: str, count: int) -> None:
    """Wait for so many lines about cut answers; each has its tokens."""
    deadline = time.monotonic() + 30
    while len(found := [e for e in server.log if e.get("ended") == ended]) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(found) == count and all("prompt_tokens" in entry for entry in found)
    assert found[0]["completion_tokens"] > 0


def test_metrics_count_what_happened(server: Server, client: Any) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    before = value("persimmon_generation_tokens_total")
    answer = chat(client)
    assert value("persimmon_generation_tokens_total") - before == answer.usage.completion_tokens
    assert value("persimmon_request_success_total") > 0
    assert value("persimmon_time_to_first_token_seconds_count") > 0
    assert 0 < value("persimmon_ffn_active_fraction") < 2
    assert value("persimmon_prefix_cache_hits_total") > 0


METRICS = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "request_failure_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count", "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count", "preemptions_total", "computed_tokens_total", "engine_restarts_total",
    "ffn_active_fraction",
}  # fmt: skip


def test_every_metric_that_is_promised_is_there(server: Server, client: Any) -> None:
    chat(client)
    lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    named = {line.partition("{")[0].removeprefix("persimmon_") for line in lines}
    assert METRICS - {"request_failure_total"} <= named
    assert all('model_name="tiny"' in line for line in lines)
    documented = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert all(f"`{name.removesuffix('_count')}" in documented for name in METRICS)


def test_the_log_names_requests_and_never_prompts(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    deadline = time.monotonic() + 30  # the line is written after the answer was sent
    while not (entries := [e for e in server.log if e["request_id"] == "abc-1"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    entry = entries[-1]
    assert entry["path"] == "/v1/chat/completions" and entry["status"] == 200 and entry["completion_tokens"] <= 2
    assert "light" not in json.dumps(server.log)


def test_pages_have_strict_headers(server: Server) -> None:
    page = server.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in page.headers
    assert "http://" not in page.text and "https://" not in page.text
    assert server.http.get("/web/vendor/marked.js").headers["content-type"].startswith("text/javascript")
    for path in ("/web/../app.py", "/web/%2e%2e/app.py", "/web/vendor/marked.LICENSE", "/web/"):
        assert server.http.get(path).status_code == 404, path


def test_full_queues_answer_429() -> None:
    with running(build_deadly, max_concurrency=1, max_queue=1) as small:
        body = {"messages": HELLO, "stream": True, **ENDLESS}
        with small.http.stream("POST", "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()  # kept: without a reader the connection is closed
            next(lines)
            refused = small.chat(n=2)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_exceeded"
        small.wait_idle()
        assert small.chat().status_code == 200
