"""Models whose scores are known beforehand."""

import random
from collections.abc import Callable, Sequence

from persimmon.evals.runner import Item
from persimmon.evals.tasks.task import Generate, Likelihood, Measure, Request, Response, Score, TokenLikelihoods


class ScriptedModel:
    """A LanguageModel that answers by a function and counts what it was asked."""

    context = 16_384
    truncated = 0

    def __init__(self, answer: Callable[[Request], Response], name: str = "scripted") -> None:
        self.identity = {"model": name}
        self.asked = 0
        self._answer = answer

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        self.asked += len(requests)
        return [self._answer(request) for request in requests]


def knows(items: Sequence[Item], style: str) -> ScriptedModel:
    """A model that knows the answers to all items."""
    right: dict[Request, str] = {}
    for item in items:
        for index, request in enumerate(item.question.requests):
            if isinstance(request, Generate):
                right[request] = _right_text(item)
            elif isinstance(request, Score):
                right[request] = "best" if index == item.question.gold else "other"

    def answer(request: Request) -> Response:
        if isinstance(request, Generate):
            return [right[request]] * request.count
        if isinstance(request, Measure):
            return TokenLikelihoods([-1.0] * len(request.text.split()), len(request.text.encode()))
        return Likelihood(-0.1 if right[request] == "best" else -50.0, right[request] == "best", 1)

    return ScriptedModel(answer, "knows")


def _right_text(item: Item) -> str:
    gold, record = item.question.gold, item.record
    if "canonical_solution" in record:
        request = item.question.requests[0]
        assert isinstance(request, Generate)
        return ("" if request.context.endswith("\n") else "\n") + str(record["canonical_solution"])
    if "context_options" in record:
        return f"\n{gold + 1}"
    if isinstance(gold, list):
        return f" the {gold[0].lower()}"
    return f" {'ABCD'[gold]}" if isinstance(gold, int) else f" {gold}"


def guesses() -> ScriptedModel:
    """A model that answers at random, the same way every time."""

    def answer(request: Request) -> Response:
        rng = random.Random(repr(request))
        if isinstance(request, Generate):
            return [" " + (rng.choice("12") if "1 = " in request.context else rng.choice("ABCD"))] * request.count
        return Likelihood(-rng.random(), False, 1)

    return ScriptedModel(answer, "guesses")


def rambles(text: str = "Well, that depends on many things") -> ScriptedModel:
    """A model that never gives an answer that can be read."""

    def answer(request: Request) -> Response:
        return [text] * request.count if isinstance(request, Generate) else Likelihood(-1.0, False, 1)

    return ScriptedModel(answer, "rambles")
