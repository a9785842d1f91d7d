"""Text to token ids and back, with SentencePiece unigram vocabularies with byte fallback.

Two kinds of vocabularies are met. Those that `persimmon tokenizer train` makes are *exact*: text goes in unchanged, so
every text comes back exactly. The release's puts a space in front of a text (dummy prefix) and takes it off
again. Its ids are those of SentencePiece; text that goes on after other text (`continuation=True`) gets no such space.

A text never produces end-of-text or any other control piece, nor a byte piece by its name: `<0x0A>`, `<unk>`
and `|ENDOFTEXT|` in a text are characters like any others.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import sentencepiece

from persimmon.errors import NotFoundError, TokenizerError
from persimmon.tokenizer_files.hub_files import JSON_FILE, MODEL_FILE, write_files
from persimmon.tokenizer_files.model_proto import (
    END_OF_TEXT,
    META_SPACE,
    PieceType,
    find_end_of_text,
    is_exact,
    make_portable,
    read_model,
)
from persimmon.tokenizer_files.tokenizer_json import from_json

__all__ = ["END_OF_TEXT", "META_SPACE", "IncrementalDecoder", "Tokenizer", "split_continuation"]

_NOT_TEXT = frozenset({PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED})


class Tokenizer:
    """A vocabulary: `encode` and `decode`, and what each id stands for."""

    vocab_size: int
    """Pieces; the model may have more rows."""

    bos_id: int
    """`|ENDOFTEXT|` opens a document ..."""

    eos_id: int
    """... and closes it."""

    exact: bool
    """Whether every text comes back exactly."""

    special_ids: frozenset[int]
    """Ids that are not text and that no text produces: control, unknown and unused pieces."""

    serialized: bytes
    """The content of `tokenizer.model`; scores of an exact vocabulary are in their portable form."""

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a `tokenizer.model`. Raises TokenizerError if it is not one that can be used."""
        parsed = read_model(model)
        self.exact = is_exact(parsed)
        self.bos_id = self.eos_id = find_end_of_text(parsed)
        if self.exact:
            make_portable(parsed)
        # Whatever the file calls it, no text may produce it.
        parsed.pieces[self.eos_id].type = PieceType.CONTROL
        self.serialized = bytes(parsed.SerializeToString(deterministic=True)) if self.exact else model
        self.vocab_size = len(parsed.pieces)
        self.special_ids = frozenset(i for i, piece in enumerate(parsed.pieces) if piece.type in _NOT_TEXT)
        self._pieces: list[str] = [piece.piece for piece in parsed.pieces]
        self._bytes = {i: int(p.piece[3:5], 16) for i, p in enumerate(parsed.pieces) if p.type == PieceType.BYTE}
        self._contents: dict[int, bytes] = {}  # of the pieces that were asked for
        self._meta_ids = _byte_ids(self._bytes, META_SPACE)
        self._processor = _processor(parsed)
        spec = parsed.normalizer_spec
        self._drops_spaces: bool = spec.remove_extra_whitespaces
        self._drops_first_space: bool = spec.add_dummy_prefix or spec.remove_extra_whitespaces

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model directory (`tokenizer.model`, else `tokenizer.json`) or one such file.

        Raises NotFoundError, or TokenizerError that names the file.
        """
        path = Path(path)
        candidates = [path / MODEL_FILE, path / JSON_FILE] if path.is_dir() else [path]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise NotFoundError(f"no tokenizer at {path}" + (f": neither {MODEL_FILE} nor {JSON_FILE}" * path.is_dir()))
        try:
            content = file.read_bytes()
            return cls(_from_json_text(content) if file.suffix == ".json" else content)
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model`, and the files from which transformers' AutoTokenizer gives the same ids and texts.

        Those are `tokenizer.json`, `tokenizer_config.json` with the chat template, and `special_tokens_map.json`.
        """
        write_files(Path(directory), self.serialized, self.eos_id)

    def encode(self, text: str, *, bos: bool = False, continuation: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text without lone surrogates (TokenizerError).
            bos: put the end-of-text piece in front.
            continuation: the text goes on after other text, so no space is put in front of it.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text holds a lone surrogate at character {error.start}") from None
        ids = [self.bos_id] if bos else []
        if not self.exact:
            return ids + (self._continuing if continuation else self._processor).encode(text)
        # U+2581 stands for a space inside SentencePiece, so the character itself is spelled in bytes.
        for index, part in enumerate(text.split(META_SPACE)):
            ids += (self._meta_ids if index else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """The text of `ids`, control pieces left out and bytes that are no character as U+FFFD.

        With `continuation` the text goes on after other text: a leading space stays.
        """
        decoder = IncrementalDecoder(self, continuation=continuation)
        return "".join([decoder.add(token_id) for token_id in ids]) + decoder.finish()

    def piece(self, token_id: int) -> str:
        """The name of a piece: U+2581 is a space in it, and bytes are spelled `<0x0A>`."""
        return self._pieces[self._checked(token_id)]

    def piece_bytes(self, token_id: int) -> bytes:
        """What a piece adds to a text, in UTF-8; nothing for a control piece."""
        content = self._contents.get(token_id)
        if content is None:
            content = self._contents[token_id] = self._content(self._checked(token_id))
        return content

    def _content(self, token_id: int) -> bytes:
        if token_id in self.special_ids:
            return b""
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        return self._pieces[token_id].replace(META_SPACE, " ").encode()

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return int(token_id)

    @functools.cached_property
    def _continuing(self) -> Any:
        """A processor without the dummy prefix; a second copy of the vocabulary, so made only when needed."""
        parsed = read_model(self.serialized)
        parsed.pieces[self.eos_id].type = PieceType.CONTROL
        parsed.normalizer_spec.add_dummy_prefix = parsed.normalizer_spec.remove_extra_whitespaces = False
        return _processor(parsed)


def _processor(model: Any) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString())
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter where its message quotes damaged bytes
        raise TokenizerError(f"SentencePiece refuses the vocabulary: {error}") from None
    return processor


def _byte_ids(byte_of: dict[int, int], text: str) -> list[int]:
    id_of = {byte: token_id for token_id, byte in byte_of.items()}
    return [id_of[byte] for byte in text.encode()]


def _from_json_text(content: bytes) -> bytes:
    try:
        return from_json(json.loads(content))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"not JSON: {error}") from None


class IncrementalDecoder:
    """The text of a stream of ids, given out as soon as it is certain and never in half characters.

    What `add` and `finish` return together is `Tokenizer.decode` of the ids, whatever they are.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = False) -> None:
        """With `continuation` the stream goes on after other text: a leading space stays."""
        self._tokenizer = tokenizer
        self._at_start = tokenizer._drops_first_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The text that is certain now: "" inside a character that is spelled in bytes."""
        content = self._tokenizer.piece_bytes(token_id)
        if self._at_start and content:
            if self._tokenizer.piece(token_id).startswith(META_SPACE):
                content = content[1:]
            self._at_start = self._tokenizer._drops_spaces and not content
        return self._utf8.decode(content)

    def finish(self) -> str:
        """The end: U+FFFD if a character was left incomplete."""
        return self._utf8.decode(b"", final=True)


def split_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of `context + continuation`, cut in two for scoring the second part after the first.

    Both parts together are the ids of the whole text, as a model reads it. A piece that reaches over the boundary
    belongs to the continuation, so that the continuation is never empty, every character of it is scored, and
    nothing of it stands in the context. (Encoding the context alone and cutting the whole at its length fails
    where pieces span words: EleutherAI/lm-evaluation-harness issue 1297.) Where pieces do not say where they are in
    the text, because the vocabulary changes text on its way in and drops the continuation, it is encoded alone.

    No end-of-text is put in front. Raises TokenizerError if the continuation has no piece of its own.
    """
    whole = tokenizer.encode(context + continuation)
    boundary = len(tokenizer.decode(tokenizer.encode(context)).encode())
    sizes = [len(tokenizer.piece_bytes(token_id)) for token_id in whole]
    if whole and tokenizer._drops_first_space and tokenizer.piece(whole[0]).startswith(META_SPACE):
        sizes[0] -= 1
    kept = sum(end <= boundary for end in accumulate(sizes)) if context else 0
    head, tail = whole[:kept], whole[kept:]
    if not tail:
        tail = tokenizer.encode(continuation, continuation=True)
    if not tail:
        raise TokenizerError(f"the continuation {continuation!r} has no tokens")
    return head, tail
