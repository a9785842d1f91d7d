"""Fine-tuning: packing of whole conversations, loss on answers, and a tiny run end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_corpus import write_recipe
from persimmon.checkpoints import hub
from persimmon.config import preset
from persimmon.errors import ConfigError, DataError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import (
    ConversationRows,
    EncodedConversation,
    encode_conversation,
    first_fit,
)
from persimmon.train.finetune import answer_bits_per_byte, finetune
from persimmon.train.finetune_data import FinetuneSource, load_conversations
from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.loss import IGNORE
from persimmon.train.recipe import load_recipe


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=200), open_rows=st.integers(1, 8))
def test_first_fit_places_every_item_once_and_whole(sizes: list[int], open_rows: int) -> None:
    rows = first_fit(sizes, 50, open_rows)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= 50 for row in rows)


def made_items(count: int) -> list[tuple[EncodedConversation]]:
    items = []
    for index in range(count):
        ids = np.full(3 + index % 7, index + 2)
        targets = np.where(np.arange(len(ids)) < 2, IGNORE, ids)
        items.append((EncodedConversation(ids, targets, 5),))
    return items


def test_rows_hold_whole_conversations_and_epochs_differ() -> None:
    rows = ConversationRows(made_items(30), length=16, pad_id=1, seed=0)
    first = [rows[i] for i in range(rows.rows_per_epoch)]
    seen: list[int] = []
    for row in first:
        assert len(row.token_ids) == len(row.targets) == row.boundaries[-1] == 16
        for start, end in zip(row.boundaries, row.boundaries[1:], strict=False):
            assert len(set(row.token_ids[start:end])) == 1
            seen.append(int(row.token_ids[start]))
    assert sorted(i for i in seen if i != 1) == list(range(2, 32))
    padding = np.concatenate([row.targets[row.token_ids == 1] for row in first])
    assert (padding == IGNORE).all()
    second = [rows[rows.rows_per_epoch + i].token_ids.tolist() for i in range(3)]
    assert second != [row.token_ids.tolist() for row in first[:3]]


def test_no_conversation_is_an_error() -> None:
    with pytest.raises(DataError, match="no conversations"):
        ConversationRows([], 16, 1, 0)


@pytest.fixture
def settings(prepared: Path, tmp_path: Path) -> dict[str, Any]:
    """A tiny model directory, 60 conversations and a recipe."""
    tokenizer = Tokenizer.load(prepared)
    model = PersimmonModel(preset("test", vocab_size=tokenizer.vocab_size))
    model.initialize(torch.Generator().manual_seed(0), std=0.1)
    hub.save_model(model, tokenizer, tmp_path / "base", dtype=torch.float32)
    words = ["river", "stone", "light", "garden"]
    lines = [
        {"messages": [{"role": "user", "content": f"Say {w} {i}."}, {"role": "assistant", "content": f"{w} {w}."}]}
        for i in range(15)
        for w in words
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": str(tmp_path / "base"),
        "root": str(tmp_path),
        "output": str(tmp_path / "run"),
        "sources": {"chat": {"files": ["chat.jsonl"]}},
        "epochs": 6,
        "row_length": 128,
        "batch_tokens": 512,
        "held_out": 0.1,
        "threads": 1,
        "replay": {"data": str(prepared), "share": 0.25},
        "loop": {"evaluate_every": 0, "optimizer": {"matrix_lr": 0.02, "vector_lr": 0.02}},
    }


def test_a_run_lowers_the_loss_of_held_out_answers(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "recipe.yaml"))
    kept, held = load_conversations(recipe)
    assert held and {c.origin for c in kept}.isdisjoint(c.origin for c in held)
    rows: list[dict[str, Any]] = []
    finetune(recipe, resume=False, report=rows.append)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    directory = tmp_path / "run" / "model"
    tokenizer = Tokenizer.load(directory)
    items = [encode_conversation(tokenizer, c.messages, 128) for c in held]
    scores = [
        answer_bits_per_byte(hub.load_model(path, dtype=torch.float32, device=torch.device("cpu")), items)
        for path in (Path(settings["model"]), directory)
    ]
    assert scores[1] < 0.8 * scores[0]
    with pytest.raises(ConfigError, match="--resume"):
        finetune(recipe, resume=False, report=rows.append)


BROKEN = ['{"messages": [', '{"messages": []}', '["no object"]', "caf\xe9"]


def test_broken_records_stop_or_are_skipped_and_named(
    settings: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    clean = (tmp_path / "chat.jsonl").read_bytes().splitlines()
    mixed = [*clean[:7], *(line.encode("latin-1") for line in BROKEN), *clean[7:]]
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join(mixed))
    del settings["replay"]
    settings["epochs"] = 1
    with pytest.raises(DataError, match=r"chat\.jsonl:8: not JSON"):
        finetune(load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "r.yaml")), resume=False, report=print)
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(clean))
    losses = []
    for name, files in (("skip", ["chat.jsonl"]), ("clean", ["clean.jsonl"])):
        changed = settings | {"output": str(tmp_path / name), "on_error": "skip", "sources": {"a": {"files": files}}}
        rows: list[dict[str, Any]] = []
        recipe = load_recipe(FinetuneRecipe, write_recipe(changed, tmp_path / "r.yaml"))
        finetune(recipe, resume=False, report=rows.append)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1], "the rest is learned as if they were not there"
    named = [json.loads(line) for line in (tmp_path / "skip" / "dropped.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in named] == [f"chat.jsonl:{n}" for n in range(8, 12)]
    assert "not UTF-8" in named[3]["error"] and {line["reason"] for line in named} == {"broken"}
    assert not (tmp_path / "clean" / "dropped.jsonl").exists()
    warned = [str(w.message) for w in recwarn if "broken" in str(w.message)]
    assert len(warned) == 1 and "broken and left out: 4" in warned[0] and "chat.jsonl:8" in warned[0]
    with pytest.raises(ConfigError, match="on_error must be stop or skip"):
        load_recipe(FinetuneRecipe, write_recipe(settings | {"on_error": "ignore"}, tmp_path / "r.yaml"))


def test_replayed_rows_have_their_share(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "recipe.yaml"))
    source = FinetuneSource(recipe, ConversationRows(made_items(30), 128, 1, 0))
    assert [source._row(0, row).source for row in range(4)] == ["chat", "chat", "chat", "code"] or [
        source._row(0, row).source for row in range(4)
    ] == ["chat", "chat", "chat", "text"]


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_replay_of_all_rows_or_of_none_is_refused(share: float, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["replay"]["share"] = share
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / "recipe.yaml"))
    with pytest.raises(ConfigError, match=r"replay\.share"):
        FinetuneSource(recipe, ConversationRows(made_items(30), 128, 1, 0))


def losses(settings: dict[str, Any], tmp_path: Path, name: str, **changes: Any) -> list[float]:
    settings = settings | {"output": str(tmp_path / name), "epochs": 2, "replay": None} | changes
    rows: list[dict[str, Any]] = []
    recipe = load_recipe(FinetuneRecipe, write_recipe(settings, tmp_path / f"{name}.yaml"))
    finetune(recipe, resume=False, report=rows.append)
    return [row["loss"] for row in rows]


def test_recomputing_blocks_changes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    kept = losses(settings, tmp_path, "kept")
    assert losses(settings, tmp_path, "recomputed", loop={**settings["loop"], "activations": "none"}) == kept


def test_bfloat16_weights_with_one_byte_moments_train_as_float32_ones(settings: dict[str, Any], tmp_path: Path) -> None:
    optimizer = {"matrices": "adamw", "matrix_lr": 0.01, "vector_lr": 0.01}
    loop = {"evaluate_every": 0, "dtype": "bfloat16", "optimizer": optimizer}
    exact = losses(settings, tmp_path, "float32", loop=loop)
    small = {**loop, "optimizer": {**optimizer, "state": "int8"}}
    rounded = losses(settings, tmp_path, "bfloat16", loop=small, weights="bfloat16")
    assert exact[-1] < 0.8 * exact[0]
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.05)


def test_bfloat16_weights_without_rounding_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights bfloat16 need"):
        losses(settings, tmp_path, "refused", weights="bfloat16")
    with pytest.raises(ConfigError, match="weights must be float32 or bfloat16"):
        losses(settings, tmp_path, "refused", weights="q4")


def test_conversations_without_an_answer_in_the_row_are_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "x"}]}
    with (tmp_path / "chat.jsonl").open("a") as stream:
        stream.write(json.dumps(long) + "\n")
    with pytest.warns(UserWarning, match=r"1 of \d+ conversations have no answer within 128 tokens: left out"):
        losses(settings, tmp_path, "long")


def test_the_card_of_a_result_states_base_and_licence(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with pytest.warns(UserWarning, match="non-commercial use only, too"):
        losses(settings, tmp_path, "carded")
    card = (tmp_path / "carded" / "model" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "non-commercial use only, too" in card and "Fine-tuned" in card
