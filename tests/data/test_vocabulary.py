"""Vocabulary training: what comes out, which samples go in, and limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures_tokenizer import exact_tokenizer, made_text
from persimmon.data.learn import train_from_files
from persimmon.data.vocabulary import sample_texts, train_vocabulary
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.tokenizer import META_SPACE, Tokenizer


def test_a_vocabulary_has_its_size_and_the_pieces_that_code_needs() -> None:
    tokenizer = exact_tokenizer()
    pieces = {tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size)}
    assert tokenizer.vocab_size == len(pieces) == 420
    assert {"\n", "\n\n", "\t", "\n" + META_SPACE * 4, "\n" + META_SPACE * 20} <= pieces
    code = "if x:\n    return 1\n"
    assert "\n" + META_SPACE * 4 in [tokenizer.piece(token_id) for token_id in tokenizer.encode(code)]


def test_no_piece_joins_a_character_with_a_space_or_line_break_after_it() -> None:
    """What keeps the segments of a chat apart (persimmon.chat)."""
    tokenizer = exact_tokenizer()
    for token_id in sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids):
        piece = tokenizer.piece(token_id)
        assert META_SPACE not in piece.lstrip("\n" + META_SPACE)
        assert "\n" not in piece.lstrip("\n")


def test_training_is_deterministic() -> None:
    text = [made_text(1, 60)]
    assert train_vocabulary(text, 360, threads=1) == train_vocabulary(text, 360, threads=1)


def test_sizes_that_a_text_does_not_allow() -> None:
    with pytest.raises(DataError, match=r"of 100000 pieces: this text gives at most \d+$"):
        train_vocabulary([made_text()], 100_000, threads=1)
    with pytest.raises(DataError, match=r"of 200 pieces: the bytes and the characters of this text need at least \d+$"):
        train_vocabulary([made_text()], 200, threads=1)
    with pytest.raises(DataError, match="no text"):
        train_vocabulary([" \n\n"], 300)


def test_text_that_the_trainer_would_leave_out_is_an_error() -> None:
    with pytest.raises(DataError, match=r"100% of the text is in lines of more than 8192 bytes"):
        train_vocabulary(["word " * 4000], 300)


def test_samples_follow_weights_and_seed() -> None:
    sources = {"a": lambda: ["a" * 100] * 50, "b": lambda: ["b" * 100] * 50}
    sample = sample_texts(sources, {"a": 0.75, "b": 0.25}, 4000, seed=0)
    assert {name: len(texts) for name, texts in sample.items()} == {"a": 30, "b": 10}
    books = {"a": lambda: ["".join(chr(97 + i % 26) for i in range(j, j + 50)) for j in range(100)]}
    first, again, other = (sample_texts(books, {"a": 1.0}, 1000, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_long_documents_enter_in_pieces() -> None:
    sample = sample_texts({"a": lambda: ["x" * 100_000, "y" * 100]}, {"a": 1.0}, 10**9, seed=0)["a"]
    assert sorted(map(len, sample))[-1] == 16_384
    assert sum(map(len, sample)) == 100_100


def test_from_files_to_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": made_text(i, 30)}) + "\n" for i in range(3)))
    (tmp_path / "b.txt").write_text(made_text(9, 30))
    lines: list[str] = []
    report = train_from_files(
        [tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", vocab_size=380, characters=10**6, threads=1,
        report=lines.append,
    )  # fmt: skip
    assert (report.vocab_size, report.documents) == (380, 4)
    assert 1.5 < report.bytes_per_token < 8
    assert 0 <= report.single_byte_share < 0.05
    assert lines[0].startswith("documents: 4, ")
    assert Tokenizer.load(tmp_path / "out").vocab_size == 380


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no documents at .*nowhere\.txt"):
        train_from_files([tmp_path / "nowhere.txt"], tmp_path, vocab_size=300, characters=100)
    for name in ("vocab_size", "characters", "threads"):
        settings = {"vocab_size": 300, "characters": 100, "threads": 1, name: 0}
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            train_from_files([], tmp_path, **settings)
