"""Text to token ids and back, with SentencePiece unigram models and byte fallback."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from persimmon.errors import NotFoundError, TokenizerError

END_OF_TEXT = "|ENDOFTEXT|"
"""The piece that opens and closes a document (id 71013 in the release)."""

META_SPACE = "\u2581"
"""SentencePiece writes a space as this character inside its pieces."""


class Tokenizer:
    """A SentencePiece unigram vocabulary. Text never produces control or byte pieces by their names."""

    def __init__(self, model: bytes) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model: {error}") from None
        self._processor = processor
        self._model = model
        self.vocab_size: int = processor.get_piece_size()
        self.eos_id = self._find_end_of_text()
        self.bos_id = self.eos_id
        # An identity-normalised vocabulary shows itself by giving "  a" back unchanged; only there is the
        # literal U+2581 kept apart from the space (spelled as its three bytes).
        self._exact = processor.decode(processor.encode("  a")) == "  a"
        self._meta_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]

    def _find_end_of_text(self) -> int:
        index = self._processor.piece_to_id(END_OF_TEXT)
        if self._processor.id_to_piece(index) == END_OF_TEXT:
            return int(index)
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        raise TokenizerError(f"the vocabulary has neither {END_OF_TEXT} nor an end-of-sentence piece")

    @property
    def serialized(self) -> bytes:
        """The content of `tokenizer.model`."""
        return self._model

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.model` of a model directory, or a `.model` file."""
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise NotFoundError(f"no tokenizer at {file}")
        return cls(file.read_bytes())

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`; `bos` puts the end-of-text piece in front."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text holds a lone surrogate at character {error.start}") from None
        ids = [self.bos_id] if bos else []
        if not self._exact or META_SPACE not in text:
            return ids + list(self._processor.encode(text))
        for index, part in enumerate(text.split(META_SPACE)):
            ids += (self._meta_bytes if index else []) + list(self._processor.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control pieces are left out."""
        return str(self._processor.decode([int(i) for i in ids]))
