"""Objectives: NEFTune's noise, seeds, and equality with the plain loss."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from persimmon import lora
from persimmon.checkpoints.adapters import LoraSettings
from persimmon.train.conversation_rows import row_seeds
from persimmon.train.loop import Batch
from persimmon.train.loss import IGNORE
from persimmon.train.objective import AnswerLoss, TokenLoss, embedding_noise
from tiny_model import tiny_ids, tiny_model


def made_batch(rows: int = 2, tokens: int = 12, seed: int = 0) -> Batch:
    model = tiny_model()
    targets = tiny_ids(model.config, rows, tokens, seed=1)
    targets[:, ::3] = IGNORE
    documents = [0, 5, 12, 20, 24][: 1 + 2 * rows]
    return Batch(tiny_ids(model.config, rows, tokens), targets, documents, row_seeds(seed, 3, range(rows)))


def test_answer_loss_without_extras_is_the_token_loss_and_both_are_the_naive_one() -> None:
    model, batch = tiny_model(), made_batch()
    plain = TokenLoss().loss(model, batch, 0.5, None)
    assert torch.equal(plain, AnswerLoss().loss(model, batch, 0.5, None))
    logits = model(batch.token_ids, documents=batch.documents).flatten(0, 1)
    naive = 0.5 * F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(plain, naive, rtol=1e-5, atol=1e-4)
    assert TokenLoss().count(batch) == int((batch.targets != IGNORE).sum())


def test_noise_has_the_size_of_the_paper_and_follows_from_the_row_alone() -> None:
    batch = made_batch()
    noise = embedding_noise(batch, 16, alpha=5.0).flatten(0, 1)
    for start, end in pairwise(batch.documents):
        limit = 5.0 / math.sqrt((end - start) * 16)
        largest = noise[start:end].abs().max()
        assert 0.9 * limit < largest <= limit
    second = Batch(batch.token_ids[1:], batch.targets[1:], [0, 8, 12], batch.seeds[1:])
    assert torch.equal(embedding_noise(second, 16, 5.0)[0], noise.view(2, 12, 16)[1])


def test_noise_is_on_in_training_only() -> None:
    model, batch = tiny_model(), made_batch()
    before = model(batch.token_ids)
    plain = AnswerLoss().loss(model, batch, 1.0, None)
    noisy = AnswerLoss(neftune_alpha=5.0)
    assert not torch.equal(noisy.loss(model, batch, 1.0, None), plain)
    assert torch.equal(noisy.loss(model, batch, 1.0, None), noisy.loss(model, batch, 1.0, None))
    other = Batch(batch.token_ids, batch.targets, batch.documents, row_seeds(0, 4, range(2)))
    assert not torch.equal(noisy.loss(model, other, 1.0, None), noisy.loss(model, batch, 1.0, None))
    assert torch.equal(model(batch.token_ids), before)


def test_dropout_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, batch = tiny_model(), made_batch()
    lora.attach(model, LoraSettings(rank=4, dropout=0.5))
    for module in lora.adapted_modules(model).values():
        module.lora_B.data.fill_(0.1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (AnswerLoss().loss(model, batch, 1.0, None) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_are_a_function_of_their_numbers() -> None:
    assert row_seeds(0, 1, [2, 3]) == (*row_seeds(0, 1, [2]), *row_seeds(0, 1, [3]))
    assert len({*row_seeds(0, 1, range(50)), *row_seeds(0, 2, range(50)), *row_seeds(1, 1, range(50))}) == 150
