"""Preference optimisation: loss and gradients against a naive implementation, packing, and a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from made_conversations import write_preferences
from made_corpus import write_recipe
from persimmon import chat, lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings
from persimmon.data.preferences import Preference
from persimmon.errors import ConfigError, DataError
from persimmon.model import PersimmonModel
from persimmon.train.conversation_rows import ConversationRows
from persimmon.train.finetune import finetune
from persimmon.train.finetune_data import load_preferences
from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.loss import IGNORE
from persimmon.train.objective import token_log_probabilities
from persimmon.train.preference import (
    PreferenceLoss,
    PreferenceRecipe,
    PreferenceSource,
    encode_pair,
    preference_scores,
    reference_margins,
)
from persimmon.train.recipe import load_recipe
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def made_preferences() -> list[Preference]:
    def user(text: str) -> Any:
        return {"role": "user", "content": text}

    def answer(text: str) -> Any:
        return {"role": "assistant", "content": text}

    return [
        Preference([user(q), answer(a)], [user(q), answer(b)], "made")
        for q, a, b in (("the light", "a story", "of"), ("a", "light of the story", "the a"), ("of", "b", "the human"))
    ] + [
        Preference(
            [user("a"), answer("b"), user("c"), answer("d")], [user("a"), answer("b"), user("c"), answer("ef")], "m"
        )
    ]


def naive_margin(model: PersimmonModel, preference: Preference) -> torch.Tensor:
    """Log-probability of the chosen last answer minus that of the rejected one, one conversation at a time."""
    sums = []
    for messages in (preference.chosen, preference.rejected):
        prompt = chat.encode(TOKENIZER, messages[:-1])
        ids, _ = chat.encode_for_training(TOKENIZER, messages)
        log_probabilities = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        sums.append(sum(log_probabilities[i, ids[i + 1]] for i in range(len(prompt) - 1, len(ids) - 1)))
    return sums[0] - sums[1]


def made_source(model: PersimmonModel, length: int = 128) -> tuple[PreferenceSource, list[Preference], torch.Tensor]:
    preferences = made_preferences()
    items = [item for p in preferences if (item := encode_pair(TOKENIZER, p, length)) is not None]
    assert len(items) == len(preferences)
    rows = ConversationRows(items, length, TOKENIZER.eos_id, seed=0)
    reference = reference_margins(model, items, lambda done: None)
    return PreferenceSource(items, reference, rows, rows.rows_per_epoch, length, 0), preferences, reference


def test_the_reference_is_the_naive_one() -> None:
    model = tiny_model()
    _, preferences, reference = made_source(model)
    naive = torch.stack([naive_margin(model, p) for p in preferences]).detach()
    torch.testing.assert_close(reference, naive, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_loss_and_gradients_are_the_formulas(smoothing: float, adapters: bool) -> None:
    """Packed rows with padding, chunks, the reference from before: equal to -log sigmoid(beta d) written out."""
    recipe = PreferenceRecipe(beta=0.05, label_smoothing=smoothing)
    model, other = tiny_model(seed=1), tiny_model(seed=1)
    source, preferences, reference = made_source(tiny_model(seed=0))
    if adapters:
        for m in (model, other):
            lora.attach(m, LoraSettings(rank=2))
    for m in (model, other):  # in training, the model has moved away from the reference
        generator = torch.Generator().manual_seed(2)
        for p in m.parameters():
            if p.requires_grad:
                p.data += 0.02 * torch.randn(p.shape, generator=generator)
    batch = source.batch(0, range(source.rows(0)))
    objective = PreferenceLoss(recipe)
    assert objective.count(batch) == len(preferences) and len(batch.documents) > 2 * len(preferences) + 1
    loss = objective.loss(model, batch, 1 / len(preferences), None)
    loss.backward()
    expected = torch.zeros(())
    for preference, r in zip(preferences, reference, strict=True):
        d = recipe.beta * (naive_margin(other, preference) - r)
        p = 1 / (1 + torch.exp(-d))
        expected = expected - ((1 - smoothing) * p.log() + smoothing * (1 - p).log()) / len(preferences)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if not one.requires_grad:
            assert one.grad is None
            continue
        scale = two.grad.abs().max()
        torch.testing.assert_close(
            one.grad / scale, two.grad / scale, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_loss_at_the_reference_is_log_two() -> None:
    model = tiny_model()
    source, preferences, _ = made_source(model)
    batch = source.batch(0, range(source.rows(0)))
    loss = PreferenceLoss(PreferenceRecipe(beta=0.1)).loss(model, batch, 1 / len(preferences), None)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-3)


def test_token_log_probabilities_and_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(23, 8, generator=generator, requires_grad=True)
    targets = torch.randint(50, (23,), generator=generator)
    targets[::5] = IGNORE
    weights = torch.randn(23, generator=generator)
    (token_log_probabilities(head, hidden, targets, chunk=7) * weights).sum().backward()
    first = hidden.grad.clone(), head.weight.grad.clone()  # type: ignore[union-attr]
    hidden.grad = head.weight.grad = None
    naive = -F.cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="none")
    assert (naive[::5] == 0).all()
    (naive * weights).sum().backward()
    torch.testing.assert_close(first, (hidden.grad, head.weight.grad), rtol=1e-5, atol=1e-6)


def test_pairs_that_do_not_fit_are_left_out() -> None:
    preference = made_preferences()[0]
    size = sum(len(part.token_ids) for part in encode_pair(TOKENIZER, preference, 10_000) or ())
    assert encode_pair(TOKENIZER, preference, size) is not None
    assert encode_pair(TOKENIZER, preference, size - 1) is None


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    write_preferences(tmp_path / "pairs.jsonl")
    return {
        "model": "mini",
        "root": str(tmp_path),
        "output": str(tmp_path / "run"),
        "sources": {"made": {"files": ["pairs.jsonl"]}},
        "lora": {"rank": 4, "alpha": 8.0},
        "preference": {"beta": 0.1},
        "epochs": 3,
        "row_length": 256,
        "batch_tokens": 1024,
        "held_out": 0.2,
        "threads": 1,
        "loop": {"evaluate_every": 0, "optimizer": {"matrices": "adamw", "matrix_lr": 3e-3, "weight_decay": 0.0}},
    }


def test_a_run_learns_the_preference(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "recipe.yaml"))
    kept, held = load_preferences(recipe)
    assert kept and held and {p.origin for p in kept}.isdisjoint(p.origin for p in held)
    rows: list[dict[str, Any]] = []
    finetune(recipe, resume=False, report=rows.append)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    scores = rows[-1]["held_out"]
    assert scores["preferred"] == 1.0 and scores["margin"] > 5 and scores["loss"] < 0.5
    from persimmon.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(hub.resolve("mini"))
    items = [item for p in held if (item := encode_pair(tokenizer, p, 256)) is not None]
    base = hub.load_model(hub.resolve("mini"), dtype=torch.float32)
    reference = reference_margins(base, items, lambda done: None)
    lora.load_adapter(base, tmp_path / "run" / "adapter")
    again = preference_scores(base, items, reference, PreferenceRecipe())
    assert again["margin"] == pytest.approx(scores["margin"], rel=1e-3)
    with lora.adapters_off(base):
        torch.testing.assert_close(reference_margins(base, items, lambda done: None), reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": {"beta": 0.0}}, r"preference\.beta must be positive"),
        ({"preference": {"label_smoothing": 0.5}}, r"preference\.label_smoothing must be in"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(FinetuneRecipe, write_recipe(settings | changes, tmp_path / "recipe.yaml"))


def test_rows_too_short_for_any_pair_are_an_error(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"row_length": 16, "batch_tokens": 64}
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "recipe.yaml"))
    with pytest.warns(UserWarning, match="pairs are longer than a row of 16"), pytest.raises(DataError):
        finetune(recipe, resume=False, report=lambda row: None)
