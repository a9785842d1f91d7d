"""Training a SentencePiece unigram vocabulary that round-trips every text exactly."""

from __future__ import annotations

import io
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    sources: Mapping[str, Callable[[], Iterable[str]]], weights: Mapping[str, float], characters: int, seed: int
) -> dict[str, list[str]]:
    """A seeded sample of about `characters` characters, with each source's share as in `weights`, which add up to 1.

    Every source is read twice (called twice), so that only the sample and four bytes per 16,384 characters are held.
    """
    return {
        name: _sample(texts, characters * weights[name], random.Random(f"{seed}:{name}"))
        for name, texts in sources.items()
    }


def _sample(texts: Callable[[], Iterable[str]], characters: float, rng: random.Random) -> list[str]:
    sizes = array("I", (len(piece) for piece in _pieces(texts())))
    order = array("I", range(len(sizes)))
    rng.shuffle(order)
    chosen: dict[int, int] = {}  # number of a piece -> its place in the sample
    for number in order:
        if characters <= 0:
            break
        chosen[number] = len(chosen)
        characters -= sizes[number]
    sample = [""] * len(chosen)
    for number, piece in enumerate(_pieces(texts())):
        if number in chosen:
            sample[chosen[number]] = piece
    return sample


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            yield text[start : start + _PIECE_CHARACTERS]


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
