"""Recall over long contexts: a needle in filler text, and a value in a list of pairs, by length and depth.

The texts are made here from a seed, so nothing has to be downloaded and nothing can have been trained on. A record's
`place` ("4k, 25 %") splits the results into the familiar grid.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence

from persimmon.evals.tasks.choices import adept_prompt, judge_likelihood
from persimmon.evals.tasks.task import (
    CountTokens,
    Generate,
    Outcome,
    Question,
    Record,
    Response,
    Score,
    Style,
    Task,
)

LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PER_PLACE = 4
"""Questions for each length and depth."""

ROOM = 96
"""Tokens left for the instruction, the question and the answer."""

_SUBJECTS = "The baker|A gardener|The old ferryman|My neighbour|The librarian|A young carpenter|The postman|Her aunt"
_VERBS = "walked along|painted|remembered|described|measured|cleaned|looked across|repaired"
_OBJECTS = "the narrow bridge|a wooden fence|the quiet harbour|an empty barn|the orchard wall|a row of windows"
_TIMES = "before breakfast|on a cold morning|while it rained|after the market closed|without any hurry|in late autumn"
_CITIES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Dakar", "Perth", "Riga", "Cusco", "Hanoi", "Tunis", "Bergen", "Porto")


def _filler(rng: random.Random) -> str:
    words = (rng.choice(part.split("|")) for part in (_SUBJECTS, _VERBS, _OBJECTS, _TIMES))
    return " ".join(words) + "."


def _pair(key: int, value: int) -> str:
    return f"key {key}: value {value}"


def fill(pieces: Callable[[], str], special: str, separator: str, tokens: int, depth: float, count: CountTokens) -> str:
    """Text of about `tokens` tokens from `pieces`, with `special` at `depth` (0 first, 1 last)."""
    parts: list[str] = []
    used = count(separator + special)
    while (used := used + count(separator + (piece := pieces()))) <= tokens:
        parts.append(piece)
    parts.insert(round(depth * len(parts)), special)
    return separator.join(parts)


def _places(context: int) -> list[tuple[int, float, int]]:
    return [
        (length, depth, number)
        for length in LENGTHS
        if length <= context
        for depth in DEPTHS
        for number in range(PER_PLACE)
    ]


def _record(task: str, place: tuple[int, float, int], text: str, cue: str, right: int, rng: random.Random) -> Record:
    length, depth, number = place
    wrong = [_number(rng, {right}) for _ in range(3)]
    candidates = [str(value) for value in (*wrong, right)]
    rng.shuffle(candidates)
    return {
        "id": f"{task}/{length}/{depth:g}/{number}",
        "place": f"{length // 1024}k, {depth:.0%}",
        "text": text,
        "cue": cue,
        "answer": str(right),
        "candidates": candidates,
    }


def _number(rng: random.Random, taken: set[int]) -> int:
    while (number := rng.randrange(10_000, 100_000)) in taken:
        pass
    return number


def needles(count: CountTokens, context: int) -> list[Record]:
    """One fact about a city somewhere in text about nothing."""
    records = []
    count = functools.cache(count)
    for place in _places(context):
        rng = random.Random(f"needle {place}")
        city, number = rng.choice(_CITIES), _number(rng, set())
        fact = f"The secret number of {city} is {number}."
        text = fill(lambda rng=rng: _filler(rng), fact, " ", place[0] - ROOM, place[1], count)  # type: ignore[misc]
        records.append(_record("needle", place, text, f"The secret number of {city} is", number, rng))
    return records


def pairs(count: CountTokens, context: int) -> list[Record]:
    """One value out of a list of keys and values."""
    records = []
    for place in _places(context):
        rng = random.Random(f"pairs {place}")
        key, value = _number(rng, set()), _number(rng, set())
        taken = {key}

        def other(rng: random.Random = rng, taken: set[int] = taken) -> str:
            taken.add(number := _number(rng, taken))
            return _pair(number, _number(rng, set()))

        # Any pair costs about the same, so one is counted for all.
        cost = max(count("\n" + other()) for _ in range(8))
        text = fill(other, _pair(key, value), "\n", place[0] - ROOM, place[1], lambda _, cost=cost: cost)  # type: ignore[misc]
        records.append(_record("key_value", place, text, f"key {key}: value", value, rng))
    return records


def _ask_generate(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    prompt = adept_prompt(instruction, [record["text"]], record["cue"])
    return Question((Generate(prompt, ("\n",), 12),), record["answer"])


def _judge_number(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
    texts = responses[0]
    assert isinstance(texts, list)
    found = re.search(r"\d+", texts[0])
    answer = found[0] if found else None
    return Outcome({"acc": float(answer == question.gold)}, answer, parsed=found is not None)


def _ask_score(record: Record, examples: Sequence[Record], instruction: str) -> Question:
    context = f"{record['text']}\n\n{record['cue']}"
    gold = record["candidates"].index(record["answer"])
    return Question(tuple(Score(context, f" {number}") for number in record["candidates"]), gold)


def _task(name: str, title: str, generate: Callable[[CountTokens, int], list[Record]], instruction: str) -> Task:
    return Task(
        name=name,
        title=title,
        version=1,
        generate=generate,
        group="place",
        styles={
            "adept": Style("generated number", 0, ("acc",), _ask_generate, _judge_number, instruction),
            "loglikelihood": Style(
                "likelihood of the right number among four",
                0,
                ("acc",),
                _ask_score,
                judge_likelihood(lambda record: record["candidates"]),
            ),
        },
    )


NEEDLE = _task("needle", "Needle", needles, "Remember the secret number that the following text mentions.")
KEY_VALUE = _task("key_value", "Key-value", pairs, "Remember the following keys and their values.")
