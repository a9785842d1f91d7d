"""Pruned vocabularies: nothing that is used changes, and everything comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_checkpoints import made_config, made_model, made_tokenizer, same_tensors
from persimmon.checkpoints.convert import write_copy
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.hub import load_model, save_model
from persimmon.checkpoints.vocabulary import VocabularyMap, find_unused, prune, restore
from persimmon.errors import CheckpointError, InputError, NotFoundError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer

UNUSED = (0, 3, 4, 270, 290, 299)
ROWS = 320  # more than the vocabulary has pieces
TEXT = "the human: adept, testing\n\u00e9 \u4f60"


@pytest.fixture
def spare() -> Tokenizer:
    """A vocabulary with pieces marked as unused, the first one in front of everything."""
    return made_tokenizer(unused=UNUSED)


@pytest.fixture
def full(spare: Tokenizer, tmp_path: Path) -> Path:
    config = made_config(spare, vocab_size=ROWS)
    save_model(made_model(config, dtype=torch.bfloat16), spare, tmp_path / "full")
    return tmp_path / "full"


def logits(model: PersimmonModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def test_pruning_changes_no_logit_of_a_kept_id(full: Path, spare: Tokenizer, tmp_path: Path) -> None:
    mapping = prune(full, tmp_path / "pruned")
    assert mapping.size == made_tokenizer().vocab_size == ROWS - 20 - len(UNUSED)
    tokenizer = Tokenizer.load(tmp_path / "pruned")
    assert [tokenizer.piece(i) for i in range(mapping.size)] == [
        spare.piece(mapping.original_id(i)) for i in range(mapping.size)
    ]
    before, after = spare.encode(TEXT, bos=True), tokenizer.encode(TEXT, bos=True)
    assert [mapping.original_id(i) for i in after] == before
    assert tokenizer.decode(after) == spare.decode(before)
    config = open_directory(tmp_path / "pruned").config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (mapping.size, 1, 1)
    kept = torch.tensor([mapping.original_id(i) for i in range(mapping.size)])
    for dtype in (torch.float32, torch.bfloat16):
        old = logits(load_model(full, dtype=dtype), before)[:, kept]
        assert torch.equal(logits(load_model(tmp_path / "pruned", dtype=dtype), after), old)


def test_kept_rows_are_the_same_bits(full: Path, tmp_path: Path) -> None:
    mapping = prune(full, tmp_path / "pruned")
    kept = torch.tensor([mapping.original_id(i) for i in range(mapping.size)])
    old, new = load_model(full).state_dict(), load_model(tmp_path / "pruned").state_dict()
    for name, tensor in old.items():
        expected = tensor[kept] if name in ("embed_tokens.weight", "lm_head.weight") else tensor
        assert torch.equal(new[name], expected)


def test_restoring_gives_the_original(full: Path, tmp_path: Path) -> None:
    (full / "README.md").write_text("card")
    prune(full, tmp_path / "pruned")
    restore(tmp_path / "pruned", tmp_path / "restored")
    assert {f.name: f.read_bytes() for f in full.iterdir() if f.name != "checksums.json"} == {
        f.name: f.read_bytes() for f in (tmp_path / "restored").iterdir() if f.name != "checksums.json"
    }


def test_training_in_between_survives(full: Path, tmp_path: Path) -> None:
    prune(full, tmp_path / "pruned")
    trained = load_model(tmp_path / "pruned")
    with torch.no_grad():
        trained.embed_tokens.weight[1] += 1
    mapping = VocabularyMap.load(tmp_path / "pruned")
    save_model(trained, Tokenizer.load(tmp_path / "pruned"), tmp_path / "trained")
    for name in ("vocabulary_map.json", "vocabulary_dropped.safetensors"):
        (tmp_path / "trained" / name).write_bytes((tmp_path / "pruned" / name).read_bytes())
    restore(tmp_path / "trained", tmp_path / "restored")
    old, new = load_model(full).embed_tokens.weight, load_model(tmp_path / "restored").embed_tokens.weight
    changed = (old != new).any(dim=1).nonzero().flatten().tolist()
    assert changed == [mapping.original_id(1)]


def test_discarded_rows_cannot_come_back(full: Path, tmp_path: Path) -> None:
    prune(full, tmp_path / "pruned", keep_dropped=False)
    with pytest.raises(NotFoundError, match="were discarded"):
        restore(tmp_path / "pruned", tmp_path / "restored")
    with pytest.raises(NotFoundError, match="was not pruned"):
        restore(full, tmp_path / "restored")


def test_pieces_named_by_a_pattern(full: Path, spare: Tokenizer, tmp_path: Path) -> None:
    mapping = prune(full, tmp_path / "pruned", unused=r".|\|ENDOFTEXT\||<unk>|<0x0A>")
    pieces = {Tokenizer.load(tmp_path / "pruned").piece(i) for i in range(mapping.size)}
    assert "a" not in pieces and {"ing", "|ENDOFTEXT|", "<unk>", "<0x0A>"} <= pieces
    restore(tmp_path / "pruned", tmp_path / "restored")
    assert same_tensors(load_model(tmp_path / "restored"), load_model(full))
    assert Tokenizer.load(tmp_path / "restored").serialized == spare.serialized
    with pytest.raises(InputError, match="regular expression"):
        prune(full, tmp_path / "other", unused="(")


def test_what_cannot_be_pruned(full: Path, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to drop: all 294 rows"):
        prune(directory, tmp_path / "pruned")
    with pytest.raises(InputError, match="is the model itself"):
        prune(full, full)
    prune(full, tmp_path / "pruned")
    with pytest.raises(InputError, match="pruned already"):
        prune(tmp_path / "pruned", tmp_path / "again")


def test_copies_carry_the_map(full: Path, tmp_path: Path) -> None:
    prune(full, tmp_path / "pruned")
    write_copy(open_directory(tmp_path / "pruned"), tmp_path / "copy")
    restore(tmp_path / "copy", tmp_path / "restored")
    assert same_tensors(load_model(tmp_path / "restored"), load_model(full))
    write_copy(open_directory(tmp_path / "pruned"), tmp_path / "wide", dtype=torch.float32)
    with pytest.raises(NotFoundError, match="discarded"):
        restore(tmp_path / "wide", tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a vocabulary map"),
        ('{"original_vocab_size": 320, "kept": [[5, 3]]}', "ascending ranges inside 0 to 320"),
        ('{"original_vocab_size": 320, "kept": [[0, 321]]}', "inside 0 to 320"),
        ('{"original_vocab_size": 320, "kept": []}', "not a vocabulary map"),
        ('{"original_vocab_size": 320, "kept": [[0, 10]]}', "keeps 10 ids, the model has 294"),
    ],
)
def test_broken_maps_are_named(full: Path, tmp_path: Path, text: str, message: str) -> None:
    prune(full, tmp_path / "pruned")
    (tmp_path / "pruned" / "vocabulary_map.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path / "pruned", tmp_path / "restored")


def test_dropped_rows_must_fit(full: Path, tmp_path: Path) -> None:
    prune(full, tmp_path / "pruned")
    save_model(load_model(tmp_path / "pruned", dtype=torch.float32), None, tmp_path / "wide")
    for name in ("vocabulary_map.json", "vocabulary_dropped.safetensors"):
        (tmp_path / "wide" / name).write_bytes((tmp_path / "pruned" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: F32 \[26, 16\] expected, BF16 \[26, 16\] found"):
        restore(tmp_path / "wide", tmp_path / "restored")


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(61, 70))
def test_the_map_is_a_bijection(kept: set[int], size: int) -> None:
    mapping = VocabularyMap.keeping(sorted(kept), size)
    assert mapping.size == len(kept)
    assert [mapping.original_id(i) for i in range(mapping.size)] == sorted(kept)
    assert [mapping.new_id(i) for i in sorted(kept)] == list(range(len(kept)))
    dropped = [i for first, end in mapping.dropped for i in range(first, end)]
    assert dropped == [i for i in range(size) if i not in kept]
    assert all(mapping.new_id(i) is None for i in [*dropped, -1, size])


def test_the_map_survives_its_file(tmp_path: Path) -> None:
    mapping = find_unused(made_tokenizer(unused=UNUSED), ROWS)
    mapping.save(tmp_path)
    assert VocabularyMap.load(tmp_path) == mapping
    assert json.loads((tmp_path / "vocabulary_map.json").read_text())["vocab_size"] == mapping.size
    with pytest.raises(InputError, match="outside the pruned vocabulary"):
        mapping.original_id(mapping.size)


@given(st.text(max_size=40))
def test_texts_get_the_same_pieces(text: str) -> None:
    spare, plain = made_tokenizer(unused=UNUSED), made_tokenizer()
    mapping = find_unused(spare, ROWS)
    assert [mapping.original_id(i) for i in plain.encode(text)] == spare.encode(text)
