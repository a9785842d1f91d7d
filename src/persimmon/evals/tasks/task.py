"""What a task is: records, questions made of requests to a model, and a judgement of the responses. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
"""One line of a data set, in the schema of docs/evaluation.md."""

CountTokens = Callable[[str], int]
"""How many tokens the model under test needs for a text."""


@dataclass(frozen=True)
class Score:
    """Ask for the log-probability of `continuation` after `context`. Answered by a Likelihood."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Generate:
    """Ask for text after `context`. Answered by a list of `count` strings, each cut before the first stop string."""

    context: str
    stop: tuple[str, ...]
    max_tokens: int
    count: int = 1
    temperature: float = 0.0


@dataclass(frozen=True)
class Measure:
    """Ask for the log-probability of every token of `text`. Answered by a TokenLikelihoods."""

    text: str


Request = Score | Generate | Measure


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    log_probability: float
    """Natural logarithm, summed over its tokens."""

    greedy: bool
    """Whether each of its tokens was the most likely one."""

    num_tokens: int


@dataclass(frozen=True)
class TokenLikelihoods:
    """How likely every token of a text is."""

    log_probabilities: Sequence[float]
    """One per token, the first given the end-of-text token only."""

    num_bytes: int
    """UTF-8 bytes of the measured text."""


Response = Likelihood | TokenLikelihoods | list[str]


@dataclass(frozen=True)
class Question:
    """One scored item."""

    requests: tuple[Request, ...]
    gold: Any
    """What is right, as the style's judge understands it; JSON."""


@dataclass(frozen=True)
class Outcome:
    """The judgement of one question."""

    metrics: Mapping[str, float]
    answer: Any = None
    """What the model answered, as parsed; JSON."""

    parsed: bool = True
    """False when no answer could be read from what the model wrote; it then counts as wrong."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of a metric in the mean over questions where it is not 1 (bytes, tokens)."""


RunProgram = Callable[[str], Any]
"""The sandbox: a program in, a `persimmon.evals.sandbox.Verdict` out."""


@dataclass(frozen=True)
class Style:
    """One way of asking and scoring."""

    summary: str
    """How it asks, in a few words for reports."""

    shots: int
    """Worked examples by default."""

    metrics: tuple[str, ...]
    """Names, the main one first."""

    ask: Callable[[Record, Sequence[Record], str], Question]
    """(record, worked examples, instruction line) -> question."""

    judge: Callable[[Record, Question, Sequence[Response]], Outcome]

    instruction: str = ""
    """First line of the prompt; empty where the style has none."""

    rotate_examples: bool = False
    """Take the examples from a place in the pool that depends on the question, so that no one example and its
    answer colours a whole run."""

    programs: Callable[[Record, Question, Sequence[Response]], list[str]] | None = None
    """For tasks that run code: the programs to run, whose verdicts the judge receives as its last response."""


@dataclass(frozen=True)
class Source:
    """Where the records of a task come from."""

    file: str
    """`FILE.jsonl` or `FILE.jsonl.gz` in a data directory."""

    hub: str
    """Data set on the Hugging Face Hub."""

    configuration: str | None
    split: str
    adapt: Callable[[Record], dict[str, Any] | None]
    """A record of the Hub's data set -> one of our schema, or None to leave it out."""


@dataclass(frozen=True)
class Task:
    """A versioned declaration of one evaluation."""

    name: str
    title: str
    version: int
    """Raised whenever a prompt, a parser or a metric changes, so that scores are never compared across."""

    styles: Mapping[str, Style]
    source: Source | None = None
    examples: Source | None = None
    """Where worked examples come from; by default the first records of `source`, which are then not scored."""

    generate: Callable[[CountTokens, int], list[Record]] | None = None
    """For synthetic tasks instead of `source`: (token counter, longest context) -> records."""

    group: str | None = None
    """Record field that splits the results (MMLU: the subject). Examples come from the same group."""

    chance: float = 0.0
    """Expected main metric of random answers."""
