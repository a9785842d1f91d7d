"""`tokenizer.json`: a vocabulary in the form that the `tokenizers` library and transformers read, both ways.

Writing. An exact vocabulary keeps plain spaces in its pieces here. So nothing has to be normalized, and the character
U+2581 in a text, which SentencePiece uses for a space, is no piece: it is spelled as its bytes, as our own encoder
does. Any other vocabulary keeps U+2581 and gets the normalizer and decoder that do what its model says.

`tokenizers` finds every entry of the vocabulary in a text, byte pieces and the unknown piece included, where
SentencePiece finds only real pieces. A pre-tokenizer that cuts those names apart closes that trap. Control pieces are
special tokens as everywhere on the hub: there, unlike in our own encoder, their names in a text become their ids.

Reading. What a file may say is listed below; a setting that is not understood is an error, never a guess.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Any

from persimmon.errors import TokenizerError
from persimmon.tokenizer_files.model_proto import BYTE_NAMES, META_SPACE, TEXT_TYPES, PieceType, is_exact, new_model

_NEVER = -1e6
"""Score of unused pieces: any other way to spell a text is better."""

# -- writing -------------------------------------------------------------------------------------------------


def to_json(model: Any, eos_id: int) -> dict[str, Any]:
    """The content of `tokenizer.json` for a ModelProto; text gets the piece `eos_id` in front."""
    exact = is_exact(model)
    controls = [i for i, piece in enumerate(model.pieces) if piece.type == PieceType.CONTROL or i == eos_id]
    vocabulary = [[_hub_name(piece.piece, exact), _hub_score(piece)] for piece in model.pieces]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(i, model.pieces[i].piece) for i in controls],
        "normalizer": None if exact else _normalizer(model.normalizer_spec),
        "pre_tokenizer": _name_splitter(model, exact),
        "post_processor": _post_processor(eos_id, model.pieces[eos_id].piece),
        "decoder": _decoder(model.normalizer_spec, exact),
        "model": {
            "type": "Unigram",
            "unk_id": _unknown(model),
            "vocab": vocabulary,
            "byte_fallback": True,
        },
    }


def _unknown(model: Any) -> int:
    return next(index for index, piece in enumerate(model.pieces) if piece.type == PieceType.UNKNOWN)


def _hub_name(name: str, exact: bool) -> str:
    return name.replace(META_SPACE, " ") if exact else name


def _hub_score(piece: Any) -> float:
    if piece.type == PieceType.UNUSED:
        return _NEVER
    if piece.type == PieceType.USER_DEFINED:  # the score that SentencePiece 0.2.3 builds in
        return 0.1 * (len(piece.piece.encode()) - 1)
    return float(piece.score)


def _special_token(index: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **flags, "special": True}


def _normalizer(spec: Any) -> dict[str, Any]:
    """SentencePiece's steps in its order: character map, spaces, prefix, U+2581 for a space."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": META_SPACE})
    steps.append(_replace({"String": " "}, META_SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(spec: Any, exact: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if not exact:
        steps.insert(0, _replace({"String": META_SPACE}, " "))
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(index: int, name: str) -> dict[str, Any]:
    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    def text(part: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": part, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }


def _name_splitter(model: Any, exact: bool) -> dict[str, Any]:
    """Cut `<0x0A>` and the unknown piece's name in a text, where possible between characters that no piece joins."""
    texts = [_hub_name(piece.piece, exact) for piece in model.pieces if piece.type in TEXT_TYPES]
    joined = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
    unknown = model.pieces[_unknown(model)].piece
    return {
        "type": "Split",
        "pattern": {"Regex": "|".join((_cut("<0x", "[0-9A-F]{2}>", joined), _cut(unknown, "", joined)))},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def _cut(name: str, rest: str, joined: set[str]) -> str:
    """A pattern that matches the head of `name` where the remainder of it and `rest` follow."""
    at = next((i for i in range(1, len(name)) if name[i - 1 : i + 1] not in joined), 1)
    return f"{re.escape(name[:at])}(?={re.escape(name[at:])}{rest})"


# -- reading -------------------------------------------------------------------------------------------------


def from_json(document: Any) -> bytes:
    """The content of a `tokenizer.model` that gives the same ids. Raises TokenizerError for what it cannot express."""
    try:
        model = _read(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"not a tokenizer.json that is understood: {type(error).__name__} {error}") from None
    return bytes(model.SerializeToString(deterministic=True))


def _read(document: Any) -> Any:
    source = document["model"]
    if source.get("type", "Unigram") != "Unigram" or not source.get("byte_fallback"):
        raise TokenizerError(f"a Unigram model with byte_fallback is needed, got {source.get('type')}")
    model = new_model()
    names, scores = [name for name, _ in source["vocab"]], [score for _, score in source["vocab"]]
    if _read_rules(document, model.normalizer_spec):
        if any(META_SPACE in name for name in names):
            raise TokenizerError("pieces hold U+2581, but no rule makes it of a space")
        names = [name.replace(" ", META_SPACE) for name in names]
    types = _types(names, scores, source["unk_id"], document.get("added_tokens") or [])
    _rename_duplicates(names, types)
    for name, score, kind in zip(names, scores, types, strict=True):
        model.pieces.add(piece=name, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size, spec.unk_id = 1, True, len(names), source["unk_id"]
    spec.bos_id = spec.pad_id = -1
    spec.eos_id = names.index("</s>") if "</s>" in names else -1
    return model


def _types(names: list[str], scores: list[float], unk_id: int, added: list[dict[str, Any]]) -> list[PieceType]:
    """What each piece is; added tokens behind the vocabulary are appended to `names` and `scores`."""
    types = [
        PieceType.UNUSED if score <= _NEVER else PieceType.BYTE if name in BYTE_NAMES else PieceType.NORMAL
        for name, score in zip(names, scores, strict=True)
    ]
    for token in sorted(added, key=lambda token: int(token["id"])):
        index, name = token["id"], token["content"]
        if index == len(names):
            names.append(name)
            scores.append(0.0)
            types.append(PieceType.NORMAL)
        if not 0 <= index < len(names) or names[index] != name:
            raise TokenizerError(f"added token {name!r} has id {index}, where the vocabulary has another piece or none")
        if types[index] != PieceType.BYTE:
            types[index] = PieceType.CONTROL if token.get("special") else PieceType.USER_DEFINED
    if not 0 <= unk_id < len(names):
        raise TokenizerError(f"unk_id {unk_id} is outside the vocabulary of {len(names)}")
    types[unk_id] = PieceType.UNKNOWN
    return types


def _rename_duplicates(names: list[str], types: list[PieceType]) -> None:
    """Of equal names the last counts, as in `tokenizers`; converters leave such behind."""
    last = {name: index for index, name in enumerate(names)}
    if len(last) == len(names):
        return
    for index, name in enumerate(names):
        if last[name] != index and types[index] != PieceType.UNKNOWN:
            names[index], types[index] = f"<duplicate {index} of {name}>", PieceType.UNUSED


def _read_rules(document: dict[str, Any], spec: Any) -> bool:
    """Fill a NormalizerSpec from normalizer and pre-tokenizer; returns whether pieces hold plain spaces."""
    spec.name, spec.add_dummy_prefix, spec.remove_extra_whitespaces = "identity", False, False
    steps = [
        *_steps(document.get("normalizer"), "normalizers"),
        *_steps(document.get("pre_tokenizer"), "pretokenizers"),
    ]
    return not any([_read_rule(step, spec) for step in steps])


def _steps(rule: dict[str, Any] | None, parts: str) -> Iterable[dict[str, Any]]:
    if rule is None:
        return []
    return rule[parts] if rule["type"] == "Sequence" else [rule]


def _read_rule(step: dict[str, Any], spec: Any) -> bool:
    """Note one step in the NormalizerSpec; returns whether it writes spaces as U+2581."""
    match step:
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            spec.name, spec.precompiled_charsmap = "precompiled", base64.b64decode(charsmap)
        case {"type": "Prepend", "prepend": "\u2581"}:
            spec.add_dummy_prefix = True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            return True
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "\u2581"}:
            spec.remove_extra_whitespaces = True
        case {"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}:
            spec.remove_extra_whitespaces = True
        case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}:
            spec.add_dummy_prefix = scheme != "never"
            return True
        case {"type": "Split", "pattern": {"Regex": str(pattern)}} if (
            pattern.startswith("<") and "[0-9A-F]{2}>)" in pattern
        ):
            pass  # our own name splitter: SentencePiece does not need it
        case _:
            raise TokenizerError(f"tokenizer.json has a rule that is not understood: {str(step)[:200]}")
    return False
