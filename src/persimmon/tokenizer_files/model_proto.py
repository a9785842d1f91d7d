"""`tokenizer.model`: the fields of SentencePiece's ModelProto that matter here, read, checked and made portable.

The message classes live in a descriptor pool of their own. The generated classes of `sentencepiece` and those of
transformers claim the same file name in the default pool, so that the second import of the two fails; here nobody
is in the way. Fields that are not listed survive a round trip as unknown fields.

Source of names and numbers: `sentencepiece_model.proto` of google/sentencepiece 0.2.3.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from persimmon.errors import TokenizerError

END_OF_TEXT = "|ENDOFTEXT|"
"""The piece that opens and closes a document (id 71013 in the release)."""

META_SPACE = "\u2581"
"""SentencePiece writes a space as this character inside its pieces."""

_UNIGRAM = 1
_SCORES_PER_NAT = 128
_PACKAGE = "persimmon.sentencepiece"
_Field = descriptor_pb2.FieldDescriptorProto

# message -> (field, number, type, default); "pieces" and the specs are messages themselves.
_SCHEMA: dict[str, list[tuple[str, int, str, str]]] = {
    "Piece": [("piece", 1, "string", ""), ("score", 2, "float", "0"), ("type", 3, "int32", "1")],
    "TrainerSpec": [
        ("model_type", 3, "int32", "1"),
        ("vocab_size", 4, "int32", "8000"),
        ("treat_whitespace_as_suffix", 24, "bool", "false"),
        ("byte_fallback", 35, "bool", "false"),
        ("unk_id", 40, "int32", "0"),
        ("bos_id", 41, "int32", "1"),
        ("eos_id", 42, "int32", "2"),
        ("pad_id", 43, "int32", "-1"),
    ],
    "NormalizerSpec": [
        ("name", 1, "string", ""),
        ("precompiled_charsmap", 2, "bytes", ""),
        ("add_dummy_prefix", 3, "bool", "true"),
        ("remove_extra_whitespaces", 4, "bool", "true"),
        ("escape_whitespaces", 5, "bool", "true"),
    ],
    "Model": [
        ("pieces", 1, "Piece*", ""),
        ("trainer_spec", 2, "TrainerSpec", ""),
        ("normalizer_spec", 3, "NormalizerSpec", ""),
    ],
}


class PieceType(IntEnum):
    """What a piece is. NORMAL and USER_DEFINED pieces are found in text, the others never by their names."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
TEXT_TYPES = frozenset({PieceType.NORMAL, PieceType.USER_DEFINED})


@functools.cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2")
    for message, fields in _SCHEMA.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            field = declared.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
            if kind.endswith("*"):
                field.label = _Field.LABEL_REPEATED
            if kind.rstrip("*") in _SCHEMA:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind.rstrip('*')}"
            else:
                field.type, field.default_value = getattr(_Field, f"TYPE_{kind.upper()}"), default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def new_model() -> Any:
    """An empty ModelProto."""
    return _model_class()()


def read_model(content: bytes) -> Any:
    """Parse the content of a `tokenizer.model`.

    Raises TokenizerError unless it is a unigram vocabulary with byte fallback, the one kind that Persimmon has.
    """
    model = new_model()
    try:
        model.ParseFromString(content)
        pieces = [(piece.piece, piece.type, piece.score) for piece in model.pieces]
    except (DecodeError, ValueError) as error:
        raise TokenizerError(f"not a SentencePiece model: {error}") from None
    if not pieces:
        raise TokenizerError("not a SentencePiece model: it has no pieces")
    if not (model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise TokenizerError("the SentencePiece model is cut off: its settings behind the pieces are missing")
    spec = model.trainer_spec
    if spec.model_type != _UNIGRAM:
        raise TokenizerError(f"a unigram vocabulary is needed, this one has model_type {spec.model_type}")
    if spec.treat_whitespace_as_suffix:
        raise TokenizerError("treat_whitespace_as_suffix is not supported: words start with their space here")
    byte_names = {name for name, kind, _ in pieces if kind == PieceType.BYTE}
    if not spec.byte_fallback or byte_names != BYTE_NAMES:
        count = len(byte_names & BYTE_NAMES)
        raise TokenizerError(f"a vocabulary with byte fallback is needed, this one has {count} of 256 byte pieces")
    if sum(kind == PieceType.UNKNOWN for _, kind, _ in pieces) != 1:
        raise TokenizerError("the vocabulary must have exactly one unknown piece")
    # Damaged names come as bytes.
    if not all(isinstance(name, str) and math.isfinite(score) for name, _, score in pieces):
        raise TokenizerError("the vocabulary has names that are no text or scores that are no numbers")
    return model


def is_exact(model: Any) -> bool:
    """Whether text goes in unchanged, so that every text comes back exactly."""
    spec = model.normalizer_spec
    return bool(
        spec.escape_whitespaces
        and not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)
    )


def make_portable(model: Any) -> None:
    """Change scores of an exact vocabulary a little, so that every library finds the same pieces in a text.

    Two things make SentencePiece and `tokenizers` disagree. User-defined pieces have scores that are built into each
    library (and differ between releases of SentencePiece): they become normal pieces with a score of their own, that
    of SentencePiece 0.2.3. And path scores are added up in float32 here, float64 there, so that near ties fall either
    way: scores become multiples of 1/128 nat, whose sums are exact in both (SentencePiece restarts its sums at
    100,000 < 2**24 / 128). What is then an exact tie goes to the longer first piece in both.
    """
    for piece in model.pieces:
        if piece.type == PieceType.USER_DEFINED:
            piece.type, piece.score = PieceType.NORMAL, 0.1 * (len(piece.piece.encode()) - 1)
        if piece.type == PieceType.NORMAL:
            piece.score = round(piece.score * _SCORES_PER_NAT) / _SCORES_PER_NAT


def find_end_of_text(model: Any) -> int:
    """The id of the piece `|ENDOFTEXT|`, else that of the end-of-sentence piece.

    The vocabulary is scanned, as the reference does: what hub configurations say about it is wrong in places
    (a bos of `|ENDOFTEXT` without its last bar, no eos at all).
    """
    for index, piece in enumerate(model.pieces):
        if piece.piece == END_OF_TEXT:
            return index
    index = int(model.trainer_spec.eos_id)
    if 0 <= index < len(model.pieces) and model.pieces[index].type == PieceType.CONTROL:
        return index
    raise TokenizerError(f"the vocabulary has neither {END_OF_TEXT} nor an end-of-sentence piece")
