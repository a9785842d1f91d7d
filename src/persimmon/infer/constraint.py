"""Answers that must match a grammar: which tokens may come next. llguidance does the parsing.

Masks over ids, not text, so pieces may span several words or end inside one. The vocabulary is prepared once, when a
request first asks for a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from persimmon.errors import InputError, UnavailableError
from persimmon.tokenizer import Tokenizer

MAX_GRAMMAR_LENGTH = 65_536
"""Characters of a schema, regular expression or list of choices."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must match."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str
    """The schema as JSON, the regular expression, or a JSON list of strings."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_LENGTH:
            raise InputError(f"the {self.kind} has {len(self.text)} characters; the limit is {MAX_GRAMMAR_LENGTH}")


def json_schema(schema: Mapping[str, Any]) -> Grammar:
    """Answers that are JSON of this schema; `{"type": "object"}` is any object."""
    return Grammar("json_schema", json.dumps(schema))


def choice(options: Sequence[str]) -> Grammar:
    """Answers that are one of these texts."""
    return Grammar("choice", json.dumps(list(options)))


class Constraint:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: Any, num_rows: int) -> None:
        import llguidance.numpy

        self._matcher, self._num_rows = matcher, num_rows
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self._words = llguidance.numpy.allocate_token_bitmask(1, num_rows)

    def allowed(self) -> NDArray[np.bool_]:
        """Which of the `num_rows` ids may come next; end-of-text where the answer is complete."""
        self._fill(self._matcher, self._words, 0)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return bits[: self._num_rows].astype(bool)

    def accept(self, token_id: int) -> None:
        """The token was picked."""
        if not self._matcher.consume_token(token_id):
            raise InputError(f"the grammar became too complex: {_first_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Turns grammars into constraints over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, num_rows: int) -> None:
        """`num_rows` is the size of the logits; rows above the tokenizer's pieces are never allowed."""
        self._tokenizer, self._num_rows = tokenizer, num_rows
        self._vocabulary: Any = None

    def compile(self, grammar: Grammar) -> Constraint:
        """A fresh constraint; InputError when the grammar is wrong or too complex."""
        llguidance = _import_llguidance()
        if self._vocabulary is None:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
            self._vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=self._num_rows)
        try:
            source = _source(grammar, llguidance.LLMatcher)
            matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0)
        except ValueError as error:
            raise InputError(f"{grammar.kind}: {_first_line(error)}") from None
        if matcher.is_error():
            raise InputError(f"{grammar.kind}: {_first_line(matcher.get_error())}")
        return Constraint(matcher, self._num_rows)


class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.unk_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids | {tokenizer.eos_id})
        special = set(self.special_token_ids)
        self.tokens = [
            tokenizer.piece(i).encode() if i in special else tokenizer.piece_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _source(grammar: Grammar, matcher: Any) -> str:
    if grammar.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(grammar.text))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    return str(matcher.grammar_from_regex("|".join(f"({re.escape(option)})" for option in json.loads(grammar.text))))


def _first_line(error: object) -> str:
    """The message without the dump of the grammar that llguidance appends."""
    return str(error).strip().partition("\n")[0]


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UnavailableError("constrained answers need llguidance: pip install 'persimmon[serve]'") from None
    return llguidance
