"""Scores and texts from an OpenAI-compatible server, here a small one that makes tokens of words."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from persimmon.errors import ContextLengthError, InputError, UnavailableError
from persimmon.evals import server_client
from persimmon.evals.server_model import ServerLanguageModel, rebuilt_offsets
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Score, TokenLikelihoods


class Handler(BaseHTTPRequestHandler):
    busy = 0
    seen: list[dict[str, Any]] = []  # noqa: RUF012
    offsets = "right"
    limit = 10_000
    asked_pause = ""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "words", "max_model_len": 77}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.seen.append(body)
        if Handler.busy:
            Handler.busy -= 1
            return self._answer({"error": {}}, 503)
        if "refuse" in body["prompt"]:
            return self._answer({"error": {"message": "no"}}, 400)
        words = [found[0] for found in re.finditer(r"\s*\S+", body["prompt"])]
        if len(words) > Handler.limit:
            return self._answer({"error": {"message": "no", "code": "context_length_exceeded"}}, 400)
        usage = {"prompt_tokens": len(words), "completion_tokens": 1}
        if not body.get("echo"):
            texts = [f" said {index}.\nMore" for index in range(body.get("n", 1))]
            return self._answer({"choices": [{"index": i, "text": t} for i, t in enumerate(texts)], "usage": usage})
        words.append(" next")
        offsets = [sum(map(len, words[:index])) for index in range(len(words))]
        if Handler.offsets != "right":  # as SGLang has it
            offsets = [-1] * len(words)
        if Handler.offsets == "stripped":
            words = [word.strip() for word in words]
        if Handler.offsets == "damaged":
            words[1] = "\ufffd"
        values = [None, *(-float(len(word)) for word in words[1:])]
        tops = [None, *({word: -float(len(word)), "x": -5.0} for word in words[1:])]
        logprobs = {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
        self._answer({"choices": [{"index": 0, "text": "", "logprobs": logprobs}], "usage": usage})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status != 200 and Handler.asked_pause:
            self.send_header("Retry-After", Handler.asked_pause)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were made, on a clock of their own."""
    made: list[float] = []
    monkeypatch.setattr(server_client.time, "sleep", made.append)
    monkeypatch.setattr(server_client.time, "monotonic", lambda: sum(made))
    return made


@pytest.fixture
def url(pauses: list[float]) -> Iterator[str]:
    Handler.busy, Handler.seen, Handler.offsets, Handler.limit, Handler.asked_pause = 0, [], "right", 10_000, ""
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
    Handler.busy = 999
    with pytest.raises(UnavailableError, match="503"):
        model.count_tokens("a b")
    Handler.busy = 0
    with pytest.raises(InputError, match="400"):
        model.count_tokens("refuse")


def test_pauses_grow_or_are_as_long_as_the_server_asks(url: str, pauses: list[float]) -> None:
    model = ServerLanguageModel(url)
    Handler.busy = 8
    model.count_tokens("a b")
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6]
    pauses.clear()
    Handler.busy, Handler.asked_pause = 3, "7"
    model.count_tokens("a b")
    assert pauses == [7.0] * 3


@pytest.mark.parametrize("offsets", ["absent", "stripped"])
def test_servers_that_do_not_say_where_tokens_are(url: str, offsets: str) -> None:
    right = ServerLanguageModel(url).respond([Score("one two", " three four"), Score("one", " two")])
    Handler.offsets = offsets
    found = ServerLanguageModel(url).respond([Score("one two", " three four"), Score("one", " two")])
    assert [one.num_tokens for one in found] == [one.num_tokens for one in right] == [2, 1]  # type: ignore[union-attr]
    if offsets == "absent":
        assert found == right


def test_what_cannot_be_placed_is_not_scored(url: str) -> None:
    Handler.offsets = "damaged"
    with pytest.raises(UnavailableError, match="text_offset"):
        ServerLanguageModel(url).respond([Score("one two", " three four")])
    assert rebuilt_offsets("ab c", ["<s>", "a", "b", " c", "!"]) == [0, 0, 1, 2, 4]
    assert rebuilt_offsets("ab c", ["a", "b"]) is None
    assert rebuilt_offsets("ab", ["a", "bc"]) is None


def test_prompts_that_do_not_fit_are_cut_and_counted(url: str) -> None:
    model = ServerLanguageModel(url)
    assert model.context == 77 and ServerLanguageModel(url, context=5).context == 5
    Handler.limit = 6
    long = ("word " * 20).strip()
    score, text, measured = model.respond([Score(long, " last"), Generate(long, (), 5), Measure(long)])
    assert isinstance(score, Likelihood) and score.num_tokens == 1 and score.log_probability == -5.0
    assert text == [" said 0.\nMore"] and model.truncated == 3
    assert isinstance(measured, TokenLikelihoods) and 10 < measured.num_bytes < 40
    model.respond([Score("short", " one")])
    assert model.truncated == 3
    Handler.limit = 1
    with pytest.raises(ContextLengthError):
        model.respond([Score("a", " b c d")])


def test_bad_or_absent_server(pauses: list[float]) -> None:
    with pytest.raises(InputError, match="http://"):
        ServerLanguageModel("localhost:8000")
    with pytest.raises(UnavailableError, match="did not answer"):
        ServerLanguageModel("http://127.0.0.1:9/v1")
    assert pauses and sum(pauses) <= server_client.FIRST_PATIENCE_SECONDS, "a wrong address is told soon"
