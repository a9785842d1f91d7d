from __future__ import annotations

import math
from typing import Any

import pytest

from persimmon.errors import InputError
from persimmon.infer.params import SamplingParams


def test_defaults_are_the_models_own_distribution() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert not params.greedy and not params.penalized


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("logit_bias", {5: 101}),
        ("logit_bias", {-1: 1}),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", (3,)),
        ("seed", 2**64),
        ("seed", 1.0),
        ("logprobs", 21),
        ("context_overflow", "drop"),
    ],
)
def test_a_value_outside_its_limits_is_named_with_them(name: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert name.split("_")[0] in message
    assert any(word in message for word in ("must be", "at most"))


def test_extremes_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=1, seed=-(2**63), logprobs=0, logit_bias={0: -100, 9: 100})
    SamplingParams(temperature=100, top_p=1e-9, repetition_penalty=100, seed=2**64 - 1, logprobs=20)


def test_one_stop_string_needs_no_tuple() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_keyword_arguments_with_a_wrong_name_suggest_the_right_one() -> None:
    assert SamplingParams.of(max_tokens=3).max_tokens == 3
    with pytest.raises(InputError, match="did you mean max_tokens"):
        SamplingParams.of(max_new_tokens=3)
    with pytest.raises(InputError, match="did you mean temperature"):
        SamplingParams.of(temprature=3)
    with pytest.raises(InputError, match=r"unknown sampling parameter 'zzz'$"):
        SamplingParams.of(zzz=3)
