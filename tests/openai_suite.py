"""What the official openai client can ask of a server: every supported field, sync and async, whole and streamed.

Used on the local server with a tiny model (serve/test_openai_client.py) and on replicas of a shipped one
(serve/test_replicas.py).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from persimmon.serve.protocol import ChatRequest, CompletionRequest
from persimmon.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: str
    tokenizer: Tokenizer


@dataclass
class Result:
    """An answer, whole or put together from a stream."""

    texts: list[str]
    reasons: list[str | None]
    logprobs: list[list[Any]]
    usage: Any


Fields = dict[str, Any]
Check = Callable[[Result], bool]
HELLO = [{"role": "user", "content": "the story of light"}]
PARTS = [{"type": "text", "text": "the "}, {"type": "text", "text": "story"}]
A_OR_B = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def _anything(result: Result) -> bool:
    return len(result.texts) == 1


def _at_most(count: int) -> Check:
    return lambda result: result.usage.completion_tokens <= count


def _valid_beginning(result: Result) -> bool:
    if result.reasons[0] == "stop":
        return set(json.loads(result.texts[0])) == {"a"}
    return result.texts[0].startswith("{")


def _alternatives(count: int) -> Check:
    def check(result: Result) -> bool:
        entries = result.logprobs[0]
        return bool(entries) and all(len(e.top_logprobs) == count and e.logprob <= 0 for e in entries)

    return check


SHARED: list[tuple[Fields, Check]] = [
    ({"max_tokens": 3}, _at_most(3)),
    ({"temperature": 0}, _anything),
    ({"temperature": 1.3, "top_p": 0.9, "top_k": 20, "min_p": 0.02}, _anything),
    ({"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}, _anything),
    ({"seed": -5}, _anything),
    ({"stop": "e"}, lambda result: "e" not in result.texts[0]),
    ({"stop": ["e", "a"]}, lambda result: not set("ea") & set(result.texts[0])),
    ({"n": 3}, lambda result: len(result.texts) == 3),
    ({"regex": "[ab]{3}", "max_tokens": 9}, lambda result: re.fullmatch("[ab]{0,3}", result.texts[0]) is not None),
    ({"choice": ["a story", "light"], "max_tokens": 20}, lambda result: result.texts[0] in ("a story", "light")),
    ({"response_format": {"type": "text"}}, _anything),
    ({"response_format": {"type": "json_object"}}, lambda result: result.texts[0].lstrip().startswith("{")),
    ({"user": "someone", "prompt_cache_key": "one"}, _anything),
]

CHAT: list[tuple[Fields, Check]] = [
    *SHARED,
    (
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": A_OR_B}},
            "max_tokens": 60,
        },
        _valid_beginning,
    ),
    ({"max_tokens": None, "max_completion_tokens": 4}, _at_most(4)),
    ({"logprobs": True}, _alternatives(0)),
    ({"logprobs": True, "top_logprobs": 3}, _alternatives(3)),
    (
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "name": "ann", "content": PARTS},
                {"role": "assistant", "content": "light"},
                *HELLO,
            ]
        },
        _anything,
    ),
]  # fmt: skip

COMPLETIONS: list[tuple[Fields, Check]] = [
    *SHARED,
    ({"prompt": ["the story", "a light"]}, lambda result: len(result.texts) == 2),
    ({"prompt": [5, 9, 20], "add_special_tokens": False}, _anything),
    ({"prompt": [[5, 9], [20, 21, 22]], "n": 2}, lambda result: len(result.texts) == 4),
    ({"echo": True}, lambda result: result.texts[0].startswith("the story of light")),
    ({"echo": True, "logprobs": 2}, lambda result: len(result.logprobs[0]) > 3),
    ({"echo": True, "max_tokens": 0}, lambda result: result.texts[0] == "the story of light"),
    ({"n": 2, "best_of": 2}, lambda result: len(result.texts) == 2),
]  # fmt: skip

ALWAYS = {"model", "seed", "stream", "stream_options", "logit_bias"}
"""Fields of every call, and of tests of their own."""


def _arguments(create: Any, fields: Fields) -> Fields:
    """What the client has no argument for goes into its extra_body."""
    known = inspect.signature(create).parameters
    extra = {name: value for name, value in fields.items() if name not in known}
    plain = {name: value for name, value in fields.items() if name in known and value is not None}
    return plain | ({"extra_body": extra} if extra else {})


def _text(choice: Any, part: str) -> str:
    return str((getattr(choice, part).content if hasattr(choice, part) else choice.text) or "")


def _scores(choice: Any) -> list[Any]:
    if choice.logprobs is None:
        return []
    content = getattr(choice.logprobs, "content", None)
    return list(content if content is not None else choice.logprobs.token_logprobs or [])


def whole(answer: Any) -> Result:
    """A complete answer."""
    choices = answer.choices
    assert [choice.index for choice in choices] == list(range(len(choices)))
    return Result(
        [_text(c, "message") for c in choices], [c.finish_reason for c in choices], [_scores(c) for c in choices],
        answer.usage,
    )  # fmt: skip


def gathered(chunks: list[Any]) -> Result:
    """The chunks of a stream that was asked for usage."""
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    count = 1 + max(choice.index for chunk in chunks for choice in chunk.choices)
    result = Result([""] * count, [None] * count, [[] for _ in range(count)], chunks[-1].usage)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert result.reasons[choice.index] is None, "nothing comes after the end"
        result.texts[choice.index] += _text(choice, "delta")
        result.logprobs[choice.index] += _scores(choice)
        result.reasons[choice.index] = choice.finish_reason
    return result


class OpenAISuite:
    """Subclass it where a fixture `served` says what is running."""

    @pytest.mark.parametrize(
        ("fields", "check"), CHAT, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
    )
    def test_chats(self, served: Served, fields: Fields, check: Check) -> None:
        self._all_ways(served, "chat.completions", {"messages": HELLO, "max_tokens": 8, "seed": 3, **fields}, check)

    @pytest.mark.parametrize(
        ("fields", "check"), COMPLETIONS, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
    )
    def test_completions(self, served: Served, fields: Fields, check: Check) -> None:
        body = {"prompt": "the story of light", "max_tokens": 8, "seed": 3, **fields}
        self._all_ways(served, "completions", body, check)

    def _all_ways(self, served: Served, route: str, fields: Fields, check: Check) -> None:
        """Sync and async, whole and streamed: the same answer each time, and as it should be."""
        options: Fields = {"base_url": f"{served.url}/v1", "api_key": "any", "max_retries": 0}
        streaming = {"stream": True, "stream_options": {"include_usage": True}}

        async def asynchronous() -> tuple[Result, Result]:
            async with openai.AsyncOpenAI(**options) as client:
                create = _at(client, route).create
                body = _arguments(create, {"model": served.model, **fields})
                chunks = [chunk async for chunk in await create(**body, **streaming)]
                return whole(await create(**body)), gathered(chunks)

        with openai.OpenAI(**options) as client:
            create = _at(client, route).create
            body = _arguments(create, {"model": served.model, **fields})
            results = [whole(create(**body)), gathered(list(create(**body, **streaming))), *asyncio.run(asynchronous())]
        first = results[0]
        assert check(first), first
        for other in results[1:]:
            assert (other.texts, other.reasons, other.logprobs) == (first.texts, first.reasons, first.logprobs)
            assert other.usage.total_tokens == first.usage.total_tokens

    def test_bias(self, served: Served) -> None:
        letter = served.tokenizer.encode("b")[-1]
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            answer = client.chat.completions.create(
                model=served.model, messages=HELLO, max_tokens=4, logit_bias={str(letter): 100}
            )  # type: ignore[call-overload]
            assert answer.choices[0].message.content.strip() == "bbbb"

    def test_models(self, served: Served) -> None:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            assert [model.id for model in client.models.list()] == [served.model]
            assert client.models.retrieve(served.model).id == served.model
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("other")

    def test_answers_can_be_sent_back(self, served: Served) -> None:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            messages: list[Any] = [{"role": "developer", "content": "Be short."}, *HELLO]
            for _ in range(2):
                answer = client.chat.completions.create(model=served.model, messages=messages, max_tokens=3)
                messages.append(answer.choices[0].message)
                messages.append({"role": "user", "content": "more"})
            plain = client.chat.completions.create(model=served.model, messages=messages, max_tokens=3, seed=1)
            nothing: Any = {"tools": None, "tool_choice": "none", "metadata": None, "store": False, "functions": None}
            same = client.chat.completions.create(
                model=served.model, messages=messages, max_tokens=3, seed=1, extra_body=nothing
            )
            assert same.choices[0].message == plain.choices[0].message
            messages[0] = {"role": "system", "content": "Be short."}
            same = client.chat.completions.create(model=served.model, messages=messages, max_tokens=3, seed=1)
            assert same.choices[0].message == plain.choices[0].message

    def test_refusals_are_the_clients_errors(self, served: Served) -> None:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            for wrong in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"temperature": -1.0}):
                with pytest.raises(openai.BadRequestError) as caught:
                    client.chat.completions.create(model=served.model, messages=HELLO, **wrong)  # type: ignore[call-overload]
                assert caught.value.param == next(iter(wrong))

    def test_every_field_is_in_some_test(self) -> None:
        for model, cases, extra in (
            (ChatRequest, CHAT, {"messages"}), (CompletionRequest, COMPLETIONS, {"prompt"})
        ):  # fmt: skip
            named = {name for fields, _ in cases for name in fields} | ALWAYS | extra
            assert set(model.model_fields) <= named, set(model.model_fields) - named


def _at(client: Any, route: str) -> Any:
    for name in route.split("."):
        client = getattr(client, name)
    return client
