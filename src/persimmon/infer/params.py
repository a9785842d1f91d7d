"""How to pick tokens: the sampling parameters of one request, checked once. No torch, no numpy."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from persimmon.errors import InputError

CONTEXT_OVERFLOWS = ("error", "truncate-left", "shift")

MAX_STOPS = 16
MAX_STOP_LENGTH = 1_024
MAX_LOGPROBS = 20
"""As in the OpenAI interface (`top_logprobs`)."""

# Names other libraries use.
_OTHER_NAMES = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}


@dataclass(frozen=True)
class SamplingParams:
    """Everything that decides which tokens a request gets. A value outside its limits is an InputError."""

    max_tokens: int = 256
    """Most tokens to generate, 1 or more."""

    temperature: float = 1.0
    """Logits are divided by it, 0 to 100; 0 is greedy: always the most likely token, the lowest id among equals."""

    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this sum, in (0, 1]."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""

    min_p: float = 0.0
    """Keep tokens at least this share as likely as the most likely one, 0 to 1."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer; above 0, to 100."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already in the answer, -2 to 2."""

    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer, -2 to 2."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, each -100 to 100."""

    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it; a single string is taken as one of them."""

    seed: int | None = None
    """Same seed, same text, whatever else runs; None draws a fresh one. 64 bits, signed or not."""

    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones, 0 to 20; None: no report."""

    context_overflow: str = "error"
    """What happens when the context is full: see `infer.generate`."""

    def __post_init__(self) -> None:
        stop, bias = cast(Any, self.stop), cast(Any, self.logit_bias)
        if not isinstance(stop, str | Iterable | None):
            raise InputError(f"stop must be text or several texts, got {stop!r}")
        if not isinstance(bias, Mapping | None):
            raise InputError(f"logit_bias must be a mapping from token ids to numbers, got {bias!r}")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "logit_bias", dict(bias or {}))
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check_integer("top_k", self.top_k, 0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_below=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias token id", token_id, 0)
            _check_number(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        _check_stops(self.stop)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.context_overflow not in CONTEXT_OVERFLOWS:
            known = ", ".join(CONTEXT_OVERFLOWS)
            raise InputError(f"context_overflow must be one of {known}, got {self.context_overflow!r}")

    @classmethod
    def of(cls, **settings: Any) -> SamplingParams:
        """The parameters of keyword arguments; an unknown name is an InputError that suggests the right one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                meant = _OTHER_NAMES.get(name) or (close[0] if close else None)
                raise InputError(f"unknown sampling parameter {name!r}" + (f"; did you mean {meant}?" if meant else ""))
        return cls(**settings)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some values changed, checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def greedy(self) -> bool:
        """No randomness: temperature 0."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    limit = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise InputError(f"{name} must be {limit}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_below and value == low):
        limit = f"above {low:g} and at most {high:g}" if open_below else f"from {low:g} to {high:g}"
        raise InputError(f"{name} must be a number {limit}, got {value!r}")


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise InputError(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            shown = f"{len(stop)} characters" if isinstance(stop, str) else repr(stop)
            raise InputError(f"a stop string must be text of 1 to {MAX_STOP_LENGTH} characters, got {shown}")
