"""Training a SentencePiece unigram vocabulary that round-trips every text exactly."""

from __future__ import annotations

import io
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from persimmon.data.documents import Document, read_documents
from persimmon.errors import DataError, InputError, NotFoundError
from persimmon.tokenizer import END_OF_TEXT, META_SPACE, Tokenizer

# Line breaks with their indentation as one piece: a quarter of the training tokens is code.
_LINE_SYMBOLS = ["\n", "\n\n", "\t", *("\n" + META_SPACE * width for width in (4, 8, 12, 16, 20))]

_LINE_BYTES = 8_192
"""Longer lines are left out by SentencePiece's trainer."""

_LARGEST_LOSS = 0.1
"""Share of the text that may be in such lines."""

_PIECE_CHARACTERS = 16_384  # long documents enter the sample in pieces of this size, so that none dominates

_TRAINER_SETTINGS: dict[str, Any] = {
    "model_type": "unigram",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.9995,
    "max_sentence_length": _LINE_BYTES,
    "user_defined_symbols": _LINE_SYMBOLS,
    "unk_id": 0,
    "bos_id": 1,
    "bos_piece": END_OF_TEXT,
    "eos_id": -1,
    "pad_id": -1,
    "minloglevel": 2,
}


def sample_texts(
    sources: Mapping[str, Iterable[str]], weights: Mapping[str, float], characters: int, seed: int
) -> list[str]:
    """A seeded sample of about `characters` characters with each source's share as in `weights`."""
    chosen: list[str] = []
    for name, texts in sources.items():
        pieces = [
            text[start : start + _PIECE_CHARACTERS]
            for text in texts
            for start in range(0, len(text), _PIECE_CHARACTERS)
        ]
        random.Random(f"{seed}:{name}").shuffle(pieces)
        budget = characters * weights[name]
        for piece in pieces:
            if budget <= 0:
                break
            chosen.append(piece)
            budget -= len(piece)
    return chosen


def train_vocabulary(texts: Sequence[str], vocab_size: int, *, threads: int = 2) -> bytes:
    """The `tokenizer.model` of a unigram vocabulary with byte fallback, in portable form.

    Identity normalization, no dummy prefix and no white space removal: with byte fallback every text comes back
    exactly. `|ENDOFTEXT|` is a control piece, so no text can produce it.

    Raises DataError, with the limit, for a size that the text does not allow: it has to hold the 256 bytes and the
    characters of the text, and no more pieces than the text suggests.
    """
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    lost = sum(len(line) for line in lines if len(line.encode()) > _LINE_BYTES) / max(1, sum(map(len, lines)))
    if lost > _LARGEST_LOSS:
        raise DataError(f"{lost:.0%} of the text is in lines of more than {_LINE_BYTES} bytes; break them first")
    if not lines:
        raise DataError("no text to train a vocabulary on")
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            vocab_size=vocab_size,
            num_threads=threads,
            **_TRAINER_SETTINGS,
        )
    except RuntimeError as error:
        raise DataError(f"cannot train a vocabulary of {vocab_size} pieces: {_reason(str(error))}") from None
    return Tokenizer(buffer.getvalue()).serialized


def _reason(message: str) -> str:
    """What SentencePiece complains about, in our words where we have some."""
    if limit := re.search(r"size too high.* <= (\d+)", message):
        return f"this text gives at most {limit[1]}"
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"the bytes and the characters of this text need at least {limit[1]}"
    return message


@dataclass(frozen=True)
class VocabularyReport:
    """What a trained vocabulary does on the text that it was trained on."""

    vocab_size: int
    documents: int
    characters: int
    """Characters of the sample."""
    bytes_per_token: float
    """UTF-8 bytes of the sample by its tokens."""
    single_byte_share: float
    """Share of the tokens that spell one byte of a character without a piece."""
    seconds: float


def train_from_files(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    characters: int,
    seed: int = 0,
    threads: int = 2,
    report: Callable[[str], None] = lambda line: None,
) -> VocabularyReport:
    """Train on a sample of all documents of `files` and write the tokenizer's files to `output`.

    `report` gets a line before each step. Raises NotFoundError, DataError (file and line), InputError.
    """
    for name, value in (("vocab_size", vocab_size), ("characters", characters), ("threads", threads)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    start = time.monotonic()
    documents = [document.text for file in files for document in _read(Path(file))]
    report(f"documents: {len(documents):,}, characters: {sum(map(len, documents)):,}")
    sample = sample_texts({"documents": documents}, {"documents": 1.0}, characters, seed)
    size = sum(map(len, sample))
    report(f"training {vocab_size:,} pieces on {size:,} characters")
    tokenizer = Tokenizer(train_vocabulary(sample, vocab_size, threads=threads))
    tokenizer.save(output)
    ids = [token_id for text in sample for token_id in tokenizer.encode(text)]
    spelled = sum(tokenizer.piece(token_id).startswith("<0x") for token_id in ids)
    return VocabularyReport(
        vocab_size=tokenizer.vocab_size,
        documents=len(documents),
        characters=size,
        bytes_per_token=sum(len(text.encode()) for text in sample) / len(ids),
        single_byte_share=spelled / len(ids),
        seconds=time.monotonic() - start,
    )


def _read(file: Path) -> Iterator[Document]:
    if not file.is_file():
        raise NotFoundError(f"no documents at {file}")
    yield from read_documents(file)
