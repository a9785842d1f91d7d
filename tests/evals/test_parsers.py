"""What counts as an answer and what does not."""

import pytest

from persimmon.evals.tasks.choices import parse_letter
from persimmon.evals.tasks.hellaswag import _adapt as adapt_hellaswag
from persimmon.evals.tasks.triviaqa import normalize
from persimmon.evals.tasks.winogrande import parse_digit, sentence_and_options


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (" B", 1), ("B", 1), ("\nC", 2), (" (D)", 3), (" A: the first", 0), (" B.", 1), ("**C**", 2), (" 'D'", 3),
        (" The answer is B", 1), (" the correct answer is: C.", 2), (" Answer: A", 0), (" Option D", 3),
        (" A dog is an animal", None), (" Because of A", None), ("", None), (" E", None), (" b", None), (" Bees", None),
        (" C is correct", 2), (" D is the correct answer", 3), (" B because it is", 1), (" E and", None),
        (" A is correct", 0), (" A because", 0), (" The answer is A", 0), (" A cat is correct", None),
        (" B dogs", 1), (" 1", None), (" A's", None), (" I think B", None),
    ],
)  # fmt: skip
def test_letters(text: str, index: int | None) -> None:
    assert parse_letter(text, 4) == index


def test_letters_beyond_the_choices() -> None:
    assert parse_letter(" E", 5) == 4
    assert parse_letter(" C", 2) is None


@pytest.mark.parametrize(
    ("text", "index"),
    [("\n2", 1), (" 1", 0), ("1.", 0), ("\n1\n\nQ:", 0), (" The answer is 2", 1), (" option 1", 0), (" (2)", 1),
     ("12", None), ("3", None), ("", None), (" x1", None), (" 1.5", None)],
)  # fmt: skip
def test_digits(text: str, index: int | None) -> None:
    assert parse_digit(text) == index


@pytest.mark.parametrize(
    ("contexts", "rest", "sentence", "options"),
    [
        (["Ann met Bo, so Ann", "Ann met Bo, so Bo"], "smiled.", "Ann met Bo, so _ smiled.", ["Ann", "Bo"]),
        (["It rained on Mary", "It rained on Mark"], "'s hat.", "It rained on _'s hat.", ["Mary", "Mark"]),
        (["Bo liked the tea", "Bo liked the toast"], ".", "Bo liked the _.", ["tea", "toast"]),
        (["Ann", "Bo"], "left.", "_ left.", ["Ann", "Bo"]),
        (["We saw the red car", "We saw the red car park"], ".", "We saw the red _.", ["car", "car park"]),
    ],
)
def test_blanks(contexts: list[str], rest: str, sentence: str, options: list[str]) -> None:
    assert sentence_and_options({"context_options": contexts, "continuation": rest}) == (sentence, options)


def test_trivia_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert normalize(" The  Beatles!") == normalize("beatles") == "beatles"
    assert normalize("rock 'n' roll") == "rock n roll"
    assert normalize(" the ") == ""


def test_hub_records_are_adapted() -> None:
    row = {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "endings": ["stirs [step] it."]}
    adapted = adapt_hellaswag({**row, "label": "0"})
    assert adapted == {"context": "Cooking: A man cooks. He", "endings": ["stirs it."], "label": 0}
    spaced = adapt_hellaswag({**row, "ctx_a": "A   man  cooks.", "endings": ["stirs [step]  it."], "label": "0"})
    assert spaced["context"] == "Cooking: A  man cooks. He", "as lm-eval's one replacement leaves it"
    assert spaced["endings"] == ["stirs  it."]
