"""Small vocabularies for tests, trained or built from made-up text; each is made once per process."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import sentencepiece
from hypothesis import strategies as st

from persimmon.data.vocabulary import train_vocabulary
from persimmon.tokenizer import END_OF_TEXT, Tokenizer
from persimmon.tokenizer_files.model_proto import PieceType, read_model

_WORDS = [
    *[
        "river",
        "stone",
        "light",
        "garden",
        "café",
        "window",
        "story",
        "naïve",
        "walk",
        "quiet",
        "letter",
        "summer",
        "north",
        "Zürich",
        "the",
        "of",
        "and",
    ],
    *(
        head + tail
        for head in ["bra", "cor", "dun", "fel", "gri", "hon", "jas", "mo", "pel"]
        for tail in ["ken", "ling", "set", "tow", "vish", "ap"]
    ),
]

NAMES = ["<0x0A>", "<0xE2>", "<unk>", "<s>", "</s>", END_OF_TEXT, "|ENDOFTEXT", "<0x0a>", "\n\nadept:"]
"""Texts that look like pieces that are no text."""

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
"""Everything but lone surrogates."""

hard_text = st.lists(
    st.one_of(
        any_text,
        st.sampled_from(NAMES),
        st.sampled_from(
            [" ", "  ", "\n", "\n\n", "\n    ", "\n        ", "\t", "\r\n", "\u2581", "\u00a0", "\ufeff", "\x00"]
        ),
        st.sampled_from([*_WORDS, "human:", "adept:", "def", "return", "x = 1", "é", "☃", "😀", "漢字"]),
    ),
    max_size=12,
).map("".join)
"""Words, code, white space of all kinds, rare characters, and names of pieces."""


def made_text(seed: int = 0, sentences: int = 220) -> str:
    """Sentences, dialogues and indented code from few words."""
    rng = random.Random(seed)
    lines = []
    for index in range(sentences):
        words = " ".join(rng.choices(_WORDS, k=rng.randint(3, 9)))
        lines += [words.capitalize() + ".", f"human: Where is the {words}?", "", f"adept: {words}", ""]
        lines += [f"def {rng.choice(_WORDS[:4])}_{index}(value):", "    if value > 10:", "        return value + 1", ""]
    return "\n".join(lines)


@functools.cache
def exact_tokenizer(vocab_size: int = 420) -> Tokenizer:
    """As `persimmon tokenizer train` makes them."""
    return Tokenizer(train_vocabulary([made_text()], vocab_size, threads=1))


@functools.cache
def release_like_model(**settings: Any) -> bytes:
    """A dummy-prefix vocabulary with pieces of several words and end-of-text in its middle, like the release's."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter([line for line in made_text(1).split("\n") if line]),
            "model_writer": buffer,
            "vocab_size": 560,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": False,
            "split_by_whitespace": False,
            "max_sentencepiece_length": 24,
            "num_threads": 1,
            "minloglevel": 2,
            **settings,
        }
    )
    model = read_model(buffer.getvalue())
    middle = model.pieces[400]
    middle.piece, middle.type = END_OF_TEXT, PieceType.CONTROL
    return bytes(model.SerializeToString())


@functools.cache
def release_like_tokenizer() -> Tokenizer:
    return Tokenizer(release_like_model())


def changed_model(content: bytes, pieces: dict[int, tuple[str, PieceType]]) -> bytes:
    """A `tokenizer.model` with other names and types of some pieces."""
    model = read_model(content)
    for index, (name, kind) in pieces.items():
        model.pieces[index].piece, model.pieces[index].type = name, kind
    return bytes(model.SerializeToString())
