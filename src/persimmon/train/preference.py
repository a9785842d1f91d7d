r"""Direct preference optimisation (Rafailov et al. 2023): learn from pairs of answers which one is better.

With s the summed log-probability of an answer's tokens (end-of-text included) under the model, r the same under the
reference, and d = (s - r) of the chosen answer minus (s - r) of the rejected one, the loss of a pair is
-log sigmoid(beta d). The reference is the model as it was loaded; its sums are computed once, before the first step.
The two answers of a pair share a row, as two documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon import chat
from persimmon.data.preferences import Preference
from persimmon.errors import ConfigError
from persimmon.model import Observer, PersimmonModel, staged
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import (
    ConversationRows,
    EncodedConversation,
    Item,
    encode_conversation,
    row_seeds,
)
from persimmon.train.loop import Batch
from persimmon.train.loss import IGNORE
from persimmon.train.objective import features, token_log_probabilities, training
from persimmon.train.pretrain import stack_rows


@dataclass(frozen=True)
class PreferenceRecipe:
    """How strongly preferences pull."""

    beta: float = 0.1
    """Strength of the pull back to the reference: small values let the model move further."""
    label_smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round (conservative DPO)."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"preference.beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"preference.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """A batch of pairs: document `chosen[i]` is the better answer of pair i, the next document the other one."""

    chosen: tuple[int, ...] = ()
    reference: Tensor | None = None
    """[pairs] log-probability of the chosen answer minus that of the rejected one, under the reference."""


def encode_pair(tokenizer: Tokenizer, preference: Preference, limit: int) -> Item | None:
    """Both conversations; None when they do not fit together into `limit` positions: half an answer is no choice.

    Loss counts for the last answer alone, the one in which they differ.
    """
    chosen, rejected = (_last_answer(tokenizer, m) for m in (preference.chosen, preference.rejected))
    return (chosen, rejected) if len(chosen.token_ids) + len(rejected.token_ids) <= limit else None


def _last_answer(tokenizer: Tokenizer, messages: Sequence[Any]) -> EncodedConversation:
    whole = encode_conversation(tokenizer, messages, 1 << 62)
    start = len(chat.encode(tokenizer, messages[:-1])) - 1  # the target that the prompt's last id predicts
    targets = whole.targets.copy()
    targets[:start] = IGNORE
    return EncodedConversation(whole.token_ids, targets, whole.answer_bytes)


def answer_log_probabilities(model: PersimmonModel, batch: Batch, observe: Observer | None = None) -> Tensor:
    """Summed log-probability of the targets of every document, [documents]."""
    hidden = features(model, batch, observe).flatten(0, 1)
    tokens = token_log_probabilities(model.lm_head, hidden, batch.targets.flatten())
    # Made on the host: a GPU would have to say how long the repeated numbers are.
    sizes = torch.tensor([end - start for start, end in pairwise(batch.documents)])
    document = staged(torch.arange(len(sizes)).repeat_interleave(sizes), tokens.device)
    return torch.zeros(len(sizes), dtype=tokens.dtype, device=tokens.device).index_add(0, document, tokens)


@dataclass(frozen=True)
class PreferenceLoss:
    """-log sigmoid(beta d) of every pair."""

    recipe: PreferenceRecipe

    def count(self, batch: Batch) -> int:
        """Pairs."""
        assert isinstance(batch, PreferenceBatch)
        return len(batch.chosen)

    def loss(self, model: PersimmonModel, batch: Batch, scale: float, observe: Observer | None) -> Tensor:
        """The summed loss of the pairs times `scale`."""
        with training(model, batch):
            margins = self.recipe.beta * preference_margins(model, batch, observe)
        smoothing = self.recipe.label_smoothing
        losses = (1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)
        return -scale * losses.sum()


def preference_margins(model: PersimmonModel, batch: Batch, observe: Observer | None = None) -> Tensor:
    """How much more than the reference the model prefers the chosen answers, in nats: d of every pair."""
    assert isinstance(batch, PreferenceBatch) and batch.reference is not None
    sums = answer_log_probabilities(model, batch, observe)
    chosen = staged(torch.tensor(batch.chosen), sums.device)
    return sums[chosen] - sums[chosen + 1] - staged(batch.reference, sums.device).to(sums.dtype)


class PreferenceSource:
    """The rows of every step, with the reference's opinion of every pair."""

    def __init__(
        self,
        items: Sequence[Item],
        reference: Tensor,
        rows: ConversationRows,
        rows_per_step: int,
        length: int,
        seed: int,
    ) -> None:
        """`reference` [items] as in PreferenceBatch."""
        self._items, self._reference, self._packed = items, reference, rows
        self._rows, self._length, self._seed = rows_per_step, length, seed

    def rows(self, step: int) -> int:
        """Rows of a step."""
        return self._rows

    def row_length(self, step: int) -> int:
        """Tokens per row."""
        return self._length

    def batch(self, step: int, rows: Sequence[int]) -> PreferenceBatch:
        """Some of the step's rows."""
        numbers = [step * self._rows + row for row in rows]
        packed = stack_rows([self._packed[number] for number in numbers])
        items = [self._packed.items(number) for number in numbers]
        chosen: list[int] = []
        first = 0
        for number, inside in zip(numbers, items, strict=True):
            chosen += range(first, first + 2 * len(inside), 2)
            first += len(self._packed[number].boundaries) - 1  # padding is a document, too
        reference = self._reference[[item for inside in items for item in inside]]
        return PreferenceBatch(
            packed.token_ids, packed.targets, packed.documents, row_seeds(self._seed, step, rows),
            tuple(chosen), reference,
        )  # fmt: skip


@torch.no_grad()
def reference_margins(model: PersimmonModel, items: Sequence[Item], progress: Callable[[int], None]) -> Tensor:
    """Log-probability of every chosen answer minus that of its rejected one, under the model as it is.

    [items] in the host's memory, from where every batch takes its own.
    """
    model.eval()
    margins, device = [], next(model.parameters()).device
    for number, item in enumerate(items):
        sums = answer_log_probabilities(model, pair_batch(item, device))
        margins.append(sums[0] - sums[1])
        progress(number + 1)
    return torch.stack(margins).cpu()


def pair_batch(item: Item, device: torch.device | None = None) -> Batch:
    """One pair as a row of two documents."""
    ids, targets = (
        torch.cat([torch.from_numpy(getattr(part, name)) for part in item])[None].to(device)
        for name in ("token_ids", "targets")
    )
    return Batch(ids, targets, [0, len(item[0].token_ids), ids.shape[1]])


@torch.no_grad()
def preference_scores(
    model: PersimmonModel, items: Sequence[Item], reference: Tensor, recipe: PreferenceRecipe
) -> dict[str, float]:
    """On held-out pairs: mean loss, share of pairs judged as the people did, and mean margin d in nats."""
    model.eval()
    now = reference_margins(model, items, lambda done: None)
    margins = now - reference.to(now)
    loss = -F.logsigmoid(recipe.beta * margins).mean()
    figures = {"loss": loss, "preferred": (margins > 0).float().mean(), "margin": margins.mean()}
    return {name: round(float(value), 4) for name, value in figures.items()}
