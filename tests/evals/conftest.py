"""Self-made questions in the schemas of the real sets."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
PEOPLE = ("Anna", "Bruno", "Clara", "David", "Elena", "Felix")
THINGS = ("kite", "lamp", "boat", "drum", "vase", "sled")


def multiple_choice(count: int) -> Iterable[tuple[str, list[str], int]]:
    """Sums with four answers each."""
    for number in range(count):
        rng = random.Random(number)
        first, second = rng.randrange(2, 60), rng.randrange(2, 60)
        right = first + second
        choices = [right, right + 1, right - 2, right + 10]
        rng.shuffle(choices)
        yield f"How much is {first} plus {second}?", [str(choice) for choice in choices], choices.index(right)


def mmlu(count: int, split: str) -> list[dict[str, Any]]:
    first = 500 if split == "dev" else 0
    return [
        {"id": f"mmlu/{subject}/{split}/{n}", "subject": subject, "split": split, "question": question}
        | {"choices": choices, "answer": answer}
        for shift, subject in ((first, "simple_sums"), (first + 1000, "more_sums"))
        for n, (question, choices, answer) in enumerate(list(multiple_choice(count + shift))[shift:])
    ]


def arc(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}/{n}", "query": f"Question: {question}", "choices": choices, "gold": gold}
        for n, (question, choices, gold) in enumerate(multiple_choice(count))
    ]


def winogrande(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        rng = random.Random(n)
        first, second = rng.sample(PEOPLE, 2)
        thing, gold = rng.choice(THINGS), rng.randrange(2)
        start = f"{first} gave {second} a {thing} for number {n}, so"
        ends = ("felt generous.", "said thank you.")
        contexts = [f"{start} {name}" for name in (first, second)]
        rows.append({"id": f"winogrande/{n}", "context_options": contexts, "continuation": ends[gold], "gold": gold})
    return rows


def triviaqa(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        colour, thing = COLOURS[n % 6], THINGS[n // 6 % 6]
        context = f"Question: Which colour has {thing} number {n}?\nAnswer:"
        rows.append({"id": f"triviaqa/{n}", "context": context, "answer": colour.title(), "aliases": [f"The {colour}"]})
    return rows


def hellaswag(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        rng = random.Random(n)
        endings = [f"paints the {thing} {rng.choice(COLOURS)}." for thing in rng.sample(THINGS, 4)]
        context = f"Painting: {rng.choice(PEOPLE)} opens tin number {n}. She"
        rows.append({"id": f"hellaswag/{n}", "context": context, "endings": endings, "label": rng.randrange(4)})
    return rows


def human_eval(count: int) -> list[dict[str, Any]]:
    """Functions that add a constant; half of them through a helper line."""
    rows = []
    for n in range(count):
        name = f"add_{n}"
        prompt = f'def {name}(x: int) -> int:\n    """ Add {n} to x.\n    >>> {name}(1)\n    {n + 1}\n    """\n'
        body = f"    return x + {n}\n" if n % 2 else f"    total = x\n    total += {n}\n\n    return total\n"
        test = f"\n\n\ndef check(candidate):\n    assert candidate(1) == {n + 1}\n    assert candidate(-5) == {n - 5}\n"
        row = {"task_id": f"HumanEval/{n}", "prompt": prompt, "entry_point": name}
        rows.append({**row, "canonical_solution": body, "test": test})
    return rows


def documents(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        rng = random.Random(n)
        words = [rng.choice((*COLOURS, *PEOPLE, *THINGS)) for _ in range(150 * (n + 1))]
        rows.append({"text": " ".join(words)})
    return rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all sets."""
    directory = tmp_path_factory.mktemp("sets")
    sets = {
        "mmlu": mmlu(30, "test"),
        "mmlu_dev": mmlu(5, "dev"),
        "arc_easy": arc("arc_easy", 48),
        "arc_challenge": arc("arc_challenge", 48),
        "winogrande": winogrande(48),
        "triviaqa": triviaqa(40),
        "hellaswag": hellaswag(48),
        "human_eval": human_eval(16),
        "documents": documents(3),
    }
    for name, rows in sets.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
