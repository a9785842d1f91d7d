"""Multiple choice, both ways: generate a letter, or compare the likelihood of the choices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from persimmon.evals.tasks.task import Generate, Likelihood, Outcome, Question, Record, Response, Score, Style

LETTERS = "ABCDE"

_ANSWER = re.compile(
    r"\s*(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:(?:answer|option|choice)(?:\s+is)?\s*:?)?\s*"
    r"[\s(\[*\"'`]*([A-E])(?!\w|'\w)",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\s+(?!(?:is|because)\b)[a-z]")
"""After A: it is the word that begins a sentence, not the letter. B to E are no words."""


def parse_letter(text: str, num_choices: int) -> int | None:
    """Index of the letter that `text` answers with, or None.

    Accepts the bare letter, `(B)`, `B: its text`, `B is correct` and `The answer is B`; not a word or sentence that
    happens to begin with such a letter ("A dog", "Because").
    """
    found = _ANSWER.match(text)
    if not found or not found[1].isupper() or (found[1] == "A" and _ARTICLE.match(text, found.end())):
        return None
    index = LETTERS.index(found[1])
    return index if index < num_choices else None


def adept_prompt(instruction: str, worked: Sequence[str], asked: str) -> str:
    """The release's layout: the instruction line, the worked examples, the question, with blank lines between.

    The layout follows the sample prompts published with the release (adept-inference `prompts.md`).
    """
    return instruction + "\n" + "\n\n".join([*worked, asked])


def lettered(question: str, choices: Sequence[str], answer: int | None = None) -> str:
    """A question with one line per choice, ending at the cue or, as a worked example, at the answer's letter."""
    lines = [f"Question: {question}"]
    lines += [f"{letter}: {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([*lines, "Answer:"]) + ("" if answer is None else f" {LETTERS[answer]}")


def letter_style(
    instruction: str, read: Callable[[Record], tuple[str, Sequence[str], int]], summary: str = "generated letter"
) -> Style:
    """The release's way for lettered questions; `read` gives (question, choices, index of the right one)."""

    def ask(record: Record, examples: Sequence[Record], instruction: str) -> Question:
        worked = [lettered(*read(example)) for example in examples]
        question, choices, answer = read(record)
        prompt = adept_prompt(instruction, worked, lettered(question, choices))
        return Question((Generate(prompt, ("\n\n", "\nQuestion:"), 8),), answer)

    def judge(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
        texts = responses[0]
        assert isinstance(texts, list)
        answer = parse_letter(texts[0], len(read(record)[1]))
        return Outcome({"acc": float(answer == question.gold)}, answer, parsed=answer is not None)

    return Style(summary, 1, ("acc",), ask, judge, instruction, rotate_examples=True)


def judge_likelihood(
    texts: Callable[[Record], Sequence[str]],
) -> Callable[[Record, Question, Sequence[Response]], Outcome]:
    """acc: the likeliest choice is right. acc_norm: the same after dividing by the choice's length in characters.

    Both as in lm-eval 0.4 (`process_results` of multiple_choice tasks); the first of equals wins there as here.
    """

    def judge(record: Record, question: Question, responses: Sequence[Response]) -> Outcome:
        scores = []
        for response in responses:
            assert isinstance(response, Likelihood)
            scores.append(response.log_probability)
        normed = [score / max(1, len(text)) for score, text in zip(scores, texts(record), strict=True)]
        best, best_normed = scores.index(max(scores)), normed.index(max(normed))
        metrics = {"acc": float(best == question.gold), "acc_norm": float(best_normed == question.gold)}
        return Outcome(metrics, best)

    return judge


def likelihood_style(
    summary: str,
    shots: int,
    context: Callable[[Record], str],
    choices: Callable[[Record], Sequence[str]],
    gold: Callable[[Record], int],
    describe: Callable[[Record], str] = lambda record: "",
    metrics: tuple[str, ...] = ("acc", "acc_norm"),
) -> Style:
    """The harness's way: each choice after `context`, examples in the same form with the right choice."""

    def ask(record: Record, examples: Sequence[Record], instruction: str) -> Question:
        solved = [f"{context(example)} {choices(example)[gold(example)]}\n\n" for example in examples]
        before = describe(record) + "".join(solved) + context(record)
        return Question(tuple(Score(before, f" {choice}") for choice in choices(record)), gold(record))

    return Style(summary, shots, metrics, ask, judge_likelihood(choices))
