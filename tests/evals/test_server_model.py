"""Scores and texts from an OpenAI-compatible server, here a small one that makes tokens of words."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from persimmon.errors import InputError, UnavailableError
from persimmon.evals import server_model
from persimmon.evals.server_model import ServerLanguageModel
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Score, TokenLikelihoods


class Handler(BaseHTTPRequestHandler):
    busy = 0
    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "words"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.seen.append(body)
        if Handler.busy:
            Handler.busy -= 1
            return self._answer({"error": {}}, 503)
        if "refuse" in body["prompt"]:
            return self._answer({"error": {"message": "no"}}, 400)
        words = [found[0] for found in re.finditer(r"\s*\S+", body["prompt"])]
        usage = {"prompt_tokens": len(words), "completion_tokens": 1}
        if not body.get("echo"):
            texts = [f" said {index}.\nMore" for index in range(body.get("n", 1))]
            return self._answer({"choices": [{"index": i, "text": t} for i, t in enumerate(texts)], "usage": usage})
        words.append(" next")
        offsets = [sum(map(len, words[:index])) for index in range(len(words))]
        values = [None, *(-float(len(word)) for word in words[1:])]
        tops = [None, *({word: -float(len(word)), "x": -5.0} for word in words[1:])]
        logprobs = {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        self._answer({"choices": [{"index": 0, "text": "", "logprobs": logprobs}], "usage": usage})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(server_model.time, "sleep", lambda seconds: None)
    Handler.busy, Handler.seen = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_scores(url: str) -> None:
    model = ServerLanguageModel(url, api_key="secret")
    assert model.identity["model"] == "words"
    answers = model.respond([Score("one two", " three four"), Score("one tw", "o three"), Measure("one two three")])
    assert answers[0] == Likelihood(-11.0, False, 2)  # " three" -6, " four" -5 and the likeliest
    assert answers[1] == Likelihood(-10.0, False, 2)  # the word that spans the boundary counts
    assert answers[2] == TokenLikelihoods([-4.0, -6.0], 13)
    assert model.respond([Score("one", " two")]) == [Likelihood(-4.0, True, 1)]
    assert model.count_tokens("one two three") == 3


def test_texts(url: str) -> None:
    model = ServerLanguageModel(url)
    stops = ("\nMore", "a", "b", "c", "1.")
    answers = model.respond([Generate("go", stops, 5, count=2, temperature=1.0)])
    assert answers == [[" s", " s"]]
    assert model.respond([Generate("go", ("\nMore",), 5)]) == [[" said 0."]]
    assert Handler.seen[0]["stop"] == list(stops[:4])


def test_busy_server_is_asked_again_and_a_refusal_is_not(url: str) -> None:
    model = ServerLanguageModel(url)
    Handler.busy = 2
    assert model.count_tokens("a b") == 2
    Handler.busy = 99
    with pytest.raises(UnavailableError, match="503"):
        model.count_tokens("a b")
    Handler.busy = 0
    with pytest.raises(InputError, match="400"):
        model.count_tokens("refuse")


def test_bad_or_absent_server() -> None:
    with pytest.raises(InputError, match="http://"):
        ServerLanguageModel("localhost:8000")
    with pytest.raises(UnavailableError, match="did not answer"):
        ServerLanguageModel("http://127.0.0.1:9/v1")
