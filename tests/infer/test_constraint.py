"""Errors of grammars: what is wrong, and nothing of llguidance's state."""

from __future__ import annotations

import pytest

pytest.importorskip("llguidance")

from persimmon.errors import InputError
from persimmon.infer.constraint import Grammar, GrammarCompiler
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("text", ["(a", "(?=a)b"])
def test_a_wrong_grammar_is_told_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size).compile(Grammar("regex", text))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("regex: ")


def test_a_failure_while_answering_is_told_in_one_line() -> None:
    constraint = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size).compile(Grammar("regex", "ab"))
    with pytest.raises(InputError) as caught:
        constraint.accept(TOKENIZER.encode("z")[0])
    assert "\n" not in str(caught.value) and "<state>" not in str(caught.value)
