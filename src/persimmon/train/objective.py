"""What a step of fine-tuning minimises: an objective turns a batch into a loss with gradients; the loop does the rest.

`TokenLoss` is the cross-entropy of every target; `AnswerLoss` adds what fine-tuning wants, noise and dropout that
follow from (seed, step, row) alone; preference.py has the preference loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persimmon.model import Observer, PersimmonModel, document_positions, staged
from persimmon.train.attention import inside_documents
from persimmon.train.fused import in_use
from persimmon.train.loss import CHUNK, IGNORE, chunked_cross_entropy

if TYPE_CHECKING:
    from persimmon.train.passes import Batch


class Objective(Protocol):
    """The loss of a run."""

    def count(self, batch: Batch) -> int:
        """How many terms the batch's loss has; a step's losses are divided by their sum over all batches."""

    def loss(self, model: PersimmonModel, batch: Batch, scale: float, observe: Observer | None) -> Tensor:
        """`scale` times the sum of the batch's terms, with gradients."""


def features(model: PersimmonModel, batch: Batch, observe: Observer | None = None) -> Tensor:
    """Hidden states [B, T, H] of a batch of packed documents.

    Documents count from 0: it matters where positions are rounded (rotary_precision bfloat16).
    """
    positions = document_positions(batch.documents, *batch.token_ids.shape)
    device = batch.token_ids.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    rows, tokens = batch.token_ids.shape
    attend = inside_documents(batch.documents, rows, tokens, model.config.head_dim, device, dtype)
    return model.features(batch.token_ids, positions=positions, attend=attend, observe=observe)


def token_log_probabilities(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Log-probability [M] of every target under `head` of hidden [M, H]; 0 where the target is IGNORE.

    The logits of `chunk` positions exist at a time, and again in the backward pass, which computes them anew. Any
    module serves as head, also one whose weights are packed.
    """
    pieces = [
        cast(Tensor, checkpoint(_log_probabilities, head, h, t, use_reentrant=False))
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(pieces)


def _log_probabilities(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def cross_entropy(model: PersimmonModel, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
    """`scale` times the summed cross-entropy of hidden [M, H] under the model's head."""
    head: nn.Module = model.lm_head
    if isinstance(head, nn.Linear):
        return chunked_cross_entropy(hidden, head.weight, targets, scale=scale, fused=in_use(model))
    return -scale * token_log_probabilities(head, hidden, targets).sum()  # a packed one (qlora.py)


class TokenLoss:
    """Cross-entropy in nats of every target."""

    def count(self, batch: Batch) -> int:
        """Targets that carry loss."""
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: PersimmonModel, batch: Batch, scale: float, observe: Observer | None) -> Tensor:
        """The summed cross-entropy times `scale`."""
        hidden = features(model, batch, observe).flatten(0, 1)
        return cross_entropy(model, hidden, batch.targets.flatten(), scale)


@dataclass(frozen=True)
class AnswerLoss(TokenLoss):
    """Cross-entropy of the targets, with dropout in the adapters and noise on the embeddings while training."""

    neftune_alpha: float = 0.0
    """NEFTune (Jain et al. 2023): uniform noise of size alpha / sqrt(document length * hidden size)."""

    def loss(self, model: PersimmonModel, batch: Batch, scale: float, observe: Observer | None) -> Tensor:
        """The summed cross-entropy times `scale`."""
        with training(model, batch), noisy_embeddings(model, batch, self.neftune_alpha):
            return super().loss(model, batch, scale, observe)


@contextlib.contextmanager
def training(model: PersimmonModel, batch: Batch) -> Iterator[None]:
    """Training mode, which stays on for the backward pass, and random numbers seeded by the batch inside the block.

    Whoever evaluates turns it off: `model.eval()`.
    """
    model.train()
    devices = [batch.token_ids.device] if batch.token_ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(batch.seeds[0] if batch.seeds else 0)
        yield


@contextlib.contextmanager
def noisy_embeddings(model: PersimmonModel, batch: Batch, alpha: float) -> Iterator[None]:
    """Add NEFTune's noise to every embedding inside the block; each row's follows from its own seed."""
    if not alpha:
        yield
        return

    def add(module: nn.Module, arguments: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        return embedded + staged(embedding_noise(batch, embedded.shape[-1], alpha), embedded.device).to(embedded.dtype)

    handle = model.embed_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def embedding_noise(batch: Batch, hidden_size: int, alpha: float) -> Tensor:
    """Uniform noise [B, T, H] within +-alpha / sqrt(length * H), length being that of the token's document."""
    rows, tokens = batch.token_ids.shape
    noise = [
        torch.rand(tokens, hidden_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in batch.seeds
    ]
    lengths = torch.tensor([end - start for start, end in pairwise(batch.documents)])
    lengths = lengths.repeat_interleave(lengths).view(rows, tokens, 1)
    return torch.stack(noise) * (alpha / (lengths * hidden_size).sqrt())
