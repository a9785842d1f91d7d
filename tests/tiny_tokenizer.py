"""A vocabulary of 320 pieces that fits the `test` preset: bytes, letters, a few words and some unused pieces."""

from __future__ import annotations

from persimmon.tokenizer import Tokenizer
from persimmon.tokenizer_files.model_proto import END_OF_TEXT, META_SPACE, PieceType, new_model

WORDS = [META_SPACE + word for word in ("the", "a", "human", "adept", "story", "of", "light")]
LETTERS = [META_SPACE, "\n", ":", ".", *"abcdefghijklmnopqrstuvwxyz", "ä", "\n\nhuman:"]
PADDING = 320 - 2 - 256 - len(WORDS) - len(LETTERS)


def tiny_tokenizer(**normalizer: bool) -> Tokenizer:
    """`normalizer`: add_dummy_prefix, remove_extra_whitespaces (both off: every text comes back exactly)."""
    model = new_model()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 1, True
    spec = model.normalizer_spec
    spec.name, spec.escape_whitespaces = "identity", True
    spec.add_dummy_prefix = normalizer.get("add_dummy_prefix", False)
    spec.remove_extra_whitespaces = normalizer.get("remove_extra_whitespaces", False)
    kinds = [("<unk>", PieceType.UNKNOWN), (END_OF_TEXT, PieceType.CONTROL)]
    kinds += [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)]
    kinds += [(piece, PieceType.NORMAL) for piece in [*WORDS, *LETTERS]]
    kinds += [(f"<unused{i}>", PieceType.UNUSED) for i in range(PADDING)]
    for piece, kind in kinds:
        model.pieces.add(piece=piece, type=kind, score=-8.0 + 2.0 * len(piece) if kind == PieceType.NORMAL else 0.0)
    return Tokenizer(model.SerializeToString())
