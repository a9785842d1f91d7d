"""From logits to one token: a chain of small steps, chosen once from the parameters. NumPy, no torch.

The order is the usual one (transformers' and vLLM's): logit bias, repetition / presence / frequency penalties,
temperature, top-k, top-p, min-p, draw. Each filter works on the distribution that the one before left, renormalised.
Ids that are not text (control and unused pieces, rows above the tokenizer's size) are never picked, except
end-of-text.

The draw of token i of a request comes from a counter-based generator, Philox keyed by the seed with i as its counter
(Salmon et al. 2011): it does not depend on what else runs, nor on pausing and resuming.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from persimmon.errors import InputError, PersimmonError
from persimmon.infer.decoder import Logits
from persimmon.infer.params import SamplingParams

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

Adjust = Callable[[Scores], None]
"""Changes the scores [V] in place."""

Filter = Callable[[Scores], Mask]
"""Which of the remaining candidates, given by their scores, stay."""

_TOP_P_FIRST = 1_024
"""Candidates that top-p sorts at first; most nuclei are far smaller than a vocabulary of 262,144."""


class Vocabulary(Protocol):
    """What sampling needs to know of a tokenizer."""

    vocab_size: int
    eos_id: int

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities under the model's own distribution: before bias, penalties, temperature and filters."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely (id, logprob) pairs, best first, the lower id among equals first."""


def banned_ids(vocabulary: Vocabulary, num_rows: int) -> NDArray[np.int64]:
    """The ids below `num_rows` (rows of the head) that must never be emitted."""
    banned = np.ones(num_rows, bool)
    banned[: vocabulary.vocab_size] = False
    banned[[i for i in vocabulary.special_ids if i < num_rows]] = True
    banned[vocabulary.eos_id] = False
    return np.flatnonzero(banned)


def exact_top(params: SamplingParams, num_banned: int = 0) -> int | None:
    """How many of the largest logits must be exact for these parameters; None: all of them.

    Whatever moves logits (bias, penalties) or weighs all of them (log-probabilities, top-p or min-p without top-k)
    needs all. The banned ids may be among the largest, so they come on top.
    """
    if params.logprobs is not None or params.penalized or params.logit_bias:
        return None
    largest = 1 if params.greedy else params.top_k
    return largest + num_banned if largest else None


class Sampler:
    """Picks the tokens of one request, one call each; holds what was picked, and nothing else that changes."""

    def __init__(
        self,
        params: SamplingParams,
        banned: NDArray[np.int64],
        num_rows: int,
        *,
        prompt_ids: Sequence[int] = (),
        generated_ids: Sequence[int] = (),
    ) -> None:
        """`num_rows`: logits per position. `generated_ids` resumes a request."""
        outside = [i for i in params.logit_bias if i >= num_rows]
        if outside:
            raise InputError(f"logit_bias names token {outside[0]}; the vocabulary has {num_rows}")
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.exact_top = exact_top(params, len(banned))
        """What to pass to `Decoder.forward`."""
        self._params, self._banned = params, banned
        self._position = len(generated_ids)
        self._counts = np.bincount(np.asarray(generated_ids, np.int64), minlength=num_rows)
        self._seen = self._counts > 0
        self._seen[list(prompt_ids)] = True
        self._adjusts = self._choose_adjusts()
        self._filters = choose_filters(params)
        # The largest logit wins as it stands: nearly every greedy token.
        self._plain = params.greedy and params.logprobs is None and not self._adjusts
        self._allowed = np.ones(num_rows, bool)
        self._allowed[banned] = False

    def sample(self, logits: Logits, allowed: Mask | None = None) -> tuple[int, TokenLogprob | None]:
        """The next token from logits [V], and its log-probabilities if they were asked for.

        Where `allowed` [V] is given, only those tokens can be picked; the log-probabilities stay the model's own.
        """
        if self._plain and allowed is None:
            token_id = int(logits.argmax())
            if self._allowed[token_id] and math.isfinite(logits[token_id]):
                self.note(token_id)
                return token_id, None
        scores = logits.astype(np.float64)
        for adjust in self._adjusts:
            adjust(scores)
        scores[self._banned] = -np.inf
        if allowed is not None:
            scores[~allowed] = -np.inf
        if not np.isfinite(scores.max()):
            raise PersimmonError("the model returned no usable logits (nan, infinite, or every token excluded)")
        token_id = int(scores.argmax()) if self._params.greedy else self._draw(scores)
        self.note(token_id)
        report = None if self._params.logprobs is None else log_probability(logits, token_id, self._params.logprobs)
        return token_id, report

    def note(self, token_id: int) -> None:
        """Count a token as picked."""
        self._position += 1
        self._counts[token_id] += 1
        self._seen[token_id] = True

    def _choose_adjusts(self) -> list[Adjust]:
        params = self._params
        steps: list[tuple[bool, Adjust]] = [
            (bool(params.logit_bias), self._add_bias),
            (params.repetition_penalty != 1, self._penalize_repetition),
            (params.presence_penalty != 0 or params.frequency_penalty != 0, self._penalize_presence),
        ]
        return [adjust for wanted, adjust in steps if wanted]

    def _add_bias(self, scores: Scores) -> None:
        for token_id, bias in self._params.logit_bias.items():
            scores[token_id] += bias

    def _penalize_repetition(self, scores: Scores) -> None:
        """Tokens of the prompt and the answer, as in CTRL (Keskar et al. 2019) and transformers."""
        seen = np.flatnonzero(self._seen)
        penalty, values = self._params.repetition_penalty, scores[seen]
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)

    def _penalize_presence(self, scores: Scores) -> None:
        """Tokens of the answer only, as in the OpenAI interface."""
        used = np.flatnonzero(self._counts)
        scores[used] -= self._params.presence_penalty + self._params.frequency_penalty * self._counts[used]

    def _draw(self, scores: Scores) -> int:
        ids = np.flatnonzero(scores > -np.inf)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
            scores = (scores[ids] - scores.max()) / self._params.temperature
        for keep in self._filters:
            kept = keep(scores)
            ids, scores = ids[kept], scores[kept]
        sums = np.cumsum(np.exp(scores - scores.max()))
        index = np.searchsorted(sums, uniform(self.seed, self._position) * sums[-1], side="right")
        return int(ids[min(int(index), len(ids) - 1)])


def uniform(seed: int, counter: int) -> float:
    """Number `counter` of the stream of `seed`, in [0, 1), a multiple of 2^-53."""
    bits = np.random.Philox(key=seed % 2**64, counter=counter).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def choose_filters(params: SamplingParams) -> list[Filter]:
    """The filters that these parameters switch on, in their order."""
    steps: list[tuple[bool, Filter]] = [
        (params.top_k > 0, lambda scores: top_k(scores, params.top_k)),
        (params.top_p < 1, lambda scores: top_p(scores, params.top_p)),
        (params.min_p > 0, lambda scores: min_p(scores, params.min_p)),
    ]
    return [keep for wanted, keep in steps if wanted]


def top_k(scores: Scores, k: int) -> Mask:
    """The k largest; among equals at the edge the first ones."""
    if k >= len(scores):
        return np.ones(len(scores), bool)
    edge = np.partition(scores, -k)[-k]
    mask = scores > edge
    mask[np.flatnonzero(scores == edge)[: k - int(mask.sum())]] = True
    return mask


def top_p(scores: Scores, p: float) -> Mask:
    """The shortest run of most likely candidates whose probabilities reach p; equals in their given order."""
    likelihood = np.exp(scores - scores.max())
    goal = p * likelihood.sum()
    top = _at_least(likelihood, goal)
    order = top[np.argsort(-likelihood[top], kind="stable")]
    count = int(np.searchsorted(np.cumsum(likelihood[order]), goal)) + 1
    mask = np.zeros(len(scores), bool)
    mask[order[:count]] = True
    return mask


def _at_least(likelihood: Scores, goal: float) -> NDArray[np.int64]:
    """Indices of the largest values, enough of them to sum to `goal`, found without sorting everything."""
    size = _TOP_P_FIRST
    while size < len(likelihood):
        top = np.flatnonzero(likelihood >= np.partition(likelihood, -size)[-size])
        if likelihood[top].sum() > goal:
            return top
        size *= 8
    return np.arange(len(likelihood))


def min_p(scores: Scores, p: float) -> Mask:
    """Candidates at least p times as likely as the most likely one."""
    return scores >= scores.max() + np.log(p)


def log_probability(logits: Logits, token_id: int, num_alternatives: int) -> TokenLogprob:
    """The log-probabilities of one token and of the most likely ones under softmax(logits)."""
    scores = logits.astype(np.float64)
    peak = scores.max()
    scores -= peak + np.log(np.exp(scores - peak).sum())
    best = np.flatnonzero(top_k(scores, num_alternatives)) if num_alternatives else np.array([], np.int64)
    best = best[np.argsort(-scores[best], kind="stable")]
    alternatives = tuple((int(i), float(scores[i])) for i in best)
    return TokenLogprob(token_id, float(scores[token_id]), alternatives)
