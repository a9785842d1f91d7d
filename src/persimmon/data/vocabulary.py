"""Training a SentencePiece unigram vocabulary that round-trips every text exactly."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece

from persimmon.errors import DataError
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
    exactly. `|ENDOFTEXT|` is a control piece, so no text can produce it. The sizes that are possible lie between the
    256 bytes and every character of the text, and what the text has distinct pieces for; DataError names the limit.
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
        raise DataError(f"cannot train a vocabulary of {vocab_size} pieces: {error}") from None
    return Tokenizer(buffer.getvalue()).serialized
