"""Filters: each rule on text that breaks it and text that does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_corpus import made_code, made_text
from persimmon.data.filters import FilterRecipe
from persimmon.errors import ConfigError

PROSE = made_text(1, 40)

RULES = [
    ({"min_characters": 20}, "short", PROSE),
    ({"max_characters": 10_000}, "long " * 3000, PROSE),
    ({"max_line_characters": 200}, "var a=1;" * 40, PROSE),
    ({"max_repeated_lines": 0.3}, "Buy now!\n" * 9 + PROSE[:60], PROSE),
    ({"max_symbols": 0.3}, "<|@#$%^&*()_+=-{}[]>" * 9, made_code(1, 9)),
    ({"max_replacements": 0.0}, "caf\ufffd", "café"),
    ({"max_compression": 8.0}, "all work and no play " * 400, PROSE),
    ({"include": ("river", "stone")}, "nothing of the kind", "a stone"),
    ({"exclude": ("(?i)lorem ipsum",)}, "Lorem Ipsum dolor", PROSE),
]


@pytest.mark.parametrize(("rule", "bad", "good"), RULES, ids=[next(iter(rule[0])) for rule in RULES])
def test_each_rule(rule: dict[str, object], bad: str, good: str) -> None:
    recipe = FilterRecipe(**rule)  # type: ignore[arg-type]
    assert recipe.refusal(bad) == next(iter(rule))
    assert recipe.refusal(good) is None


@given(text=st.text())
def test_no_rule_no_refusal_and_no_text_breaks_the_measures(text: str) -> None:
    assert FilterRecipe().refusal(text) is None
    strict = FilterRecipe(
        min_characters=1, max_line_characters=9, max_repeated_lines=0.1, max_symbols=0.1, max_compression=2.0
    )
    strict.refusal(text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"max_symbols": -0.1}, "max_symbols must be at least 0, got -0.1"),
        ({"max_compression": float("nan")}, "max_compression must be at least 0, got nan"),
        ({"include": ("(",)}, r"'\(' is not a regular expression"),
    ],
)
def test_rules_that_cannot_be(rule: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterRecipe(**rule)  # type: ignore[arg-type]
