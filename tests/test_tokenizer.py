"""Text to ids and back: exactness, SentencePiece as the oracle, names of pieces, streams, splits."""

from __future__ import annotations

import functools
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixtures_tokenizer import (
    NAMES,
    changed_model,
    exact_tokenizer,
    hard_text,
    made_text,
    release_like_model,
    release_like_tokenizer,
)
from persimmon.errors import NotFoundError, TokenizerError
from persimmon.tokenizer import END_OF_TEXT, META_SPACE, IncrementalDecoder, Tokenizer, split_continuation
from persimmon.tokenizer_files.model_proto import PieceType, new_model, read_model
from persimmon.tokenizer_files.tokenizer_json import from_json, to_json

BOTH = pytest.mark.parametrize("make", [exact_tokenizer, release_like_tokenizer], ids=["exact", "release-like"])


@functools.cache
def sentencepiece_of(content: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


# -- round trip and ids --------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(text=hard_text)
@example(text="\u2581")
@example(text=" \u2581\n    \u2581\u2581 ")
@example(text="\x00\x01\r\n\x85\u2028\ufffd\U0010ffff")
def test_any_text_comes_back_exactly(text: str) -> None:
    tokenizer = exact_tokenizer()
    assert tokenizer.exact
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=hard_text)
def test_ids_of_a_dummy_prefix_vocabulary_are_those_of_sentencepiece(text: str) -> None:
    tokenizer, oracle = release_like_tokenizer(), sentencepiece_of(release_like_model())
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == oracle.decode(ids)


def test_ids_of_long_text_are_those_of_sentencepiece() -> None:
    text = made_text(3, 400)
    assert release_like_tokenizer().encode(text) == sentencepiece_of(release_like_model()).encode(text)
    # The portable form only settles what libraries disagree on; pieces of the same text stay the same.
    assert exact_tokenizer().encode(text) == sentencepiece_of(exact_tokenizer().serialized).encode(text)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(hard_text, min_size=1, max_size=4))
def test_text_that_goes_on_gets_no_space(parts: list[str]) -> None:
    tokenizer = release_like_tokenizer()
    text = "".join(parts).replace(META_SPACE, "_")
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids += tokenizer.encode(part, continuation=True)
    if parts[0]:
        assert tokenizer.decode(ids).replace(META_SPACE, "_").replace(" ", "_") == text.replace(" ", "_")
    tail = tokenizer.encode(" river", continuation=True)
    assert tokenizer.decode(tail, continuation=True) == " river"
    assert tokenizer.decode(tail) == "river"


@BOTH
def test_end_of_text_stands_in_front_when_asked(make: Any) -> None:
    tokenizer = make()
    assert tokenizer.encode("river", bos=True) == [tokenizer.bos_id, *tokenizer.encode("river")]
    assert tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("river", bos=True)) == "river"


# -- control and byte pieces ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_names_of_pieces_are_ordinary_text(make: Any, name: str) -> None:
    tokenizer = make()
    by_name = {tokenizer.piece(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    for text in (name, f"a{name}", f"{name}b", f" {name} {name}"):
        ids = tokenizer.encode(text)
        assert by_name.get(name) not in ids
        assert not tokenizer.special_ids.intersection(ids)
        assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=hard_text)
def test_no_text_produces_a_special_id(text: str) -> None:
    for tokenizer in (exact_tokenizer(), release_like_tokenizer()):
        assert not tokenizer.special_ids.intersection(tokenizer.encode(text))


@pytest.mark.parametrize("kind", [PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.CONTROL, PieceType.UNUSED])
def test_end_of_text_is_found_and_safe_whatever_the_vocabulary_calls_it(kind: PieceType) -> None:
    content = changed_model(release_like_model(), {400: (END_OF_TEXT, kind)})
    tokenizer = Tokenizer(content)
    assert tokenizer.bos_id == tokenizer.eos_id == 400
    assert 400 in tokenizer.special_ids
    assert 400 not in tokenizer.encode(f"a {END_OF_TEXT} b", continuation=True)
    assert 400 not in tokenizer.encode(f"a {END_OF_TEXT} b")
    assert tokenizer.piece_bytes(400) == b""
    assert tokenizer.serialized == content


def test_without_end_of_text_the_end_of_sentence_piece_counts() -> None:
    # A name without its last bar, as one hub configuration has it, is another piece.
    content = changed_model(release_like_model(), {400: ("|ENDOFTEXT", PieceType.CONTROL)})
    assert Tokenizer(content).piece(Tokenizer(content).eos_id) == "</s>"
    model = read_model(content)
    model.trainer_spec.eos_id = -1
    with pytest.raises(TokenizerError, match=r"neither \|ENDOFTEXT\|"):
        Tokenizer(model.SerializeToString())


def test_special_ids_and_what_pieces_add_to_a_text() -> None:
    tokenizer = exact_tokenizer()
    assert tokenizer.special_ids == {0, 1}
    assert (tokenizer.piece(0), tokenizer.piece(1), tokenizer.bos_id, tokenizer.eos_id) == ("<unk>", END_OF_TEXT, 1, 1)
    by_name = {tokenizer.piece(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    assert tokenizer.piece_bytes(by_name["<0xE2>"]) == b"\xe2"
    assert tokenizer.piece_bytes(by_name["\n" + META_SPACE * 4]) == b"\n    "
    assert tokenizer.piece_bytes(by_name[META_SPACE + "river"]) == b" river"
    assert tokenizer.piece_bytes(1) == b""


def test_unused_pieces_are_special() -> None:
    river = next(i for i in range(560) if release_like_tokenizer().piece(i) == META_SPACE + "river")
    tokenizer = Tokenizer(changed_model(release_like_model(), {river: (META_SPACE + "river", PieceType.UNUSED)}))
    assert river in tokenizer.special_ids
    assert river not in tokenizer.encode("river")
    assert tokenizer.decode(tokenizer.encode("river")) == "river"


# -- bad input -----------------------------------------------------------------------------------------------


@BOTH
def test_lone_surrogates_are_refused(make: Any) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        make().encode("ab\ud800c")


@pytest.mark.parametrize("token_id", [-1, 420, 10**9])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    tokenizer = exact_tokenizer()
    for call in (tokenizer.piece, tokenizer.piece_bytes, lambda i: tokenizer.decode([2, i])):
        with pytest.raises(TokenizerError, match=f"token id {token_id} is outside the vocabulary of 420"):
            call(token_id)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(NotFoundError, match=r"no tokenizer at .*x\.model"):
        Tokenizer.load(tmp_path / "x.model")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, bytes(range(256))])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: "):
        Tokenizer.load(tmp_path)


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_model_is_never_another_vocabulary(share: float) -> None:
    whole = exact_tokenizer().serialized
    try:
        tokenizer = Tokenizer(whole[: int(share * len(whole))])
    except TokenizerError:
        return
    assert tokenizer.serialized == whole  # only what says nothing was cut off


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_model_raises_nothing_else(place: float, value: int) -> None:
    content = bytearray(exact_tokenizer().serialized)
    content[int(place * len(content))] = value
    try:
        tokenizer = Tokenizer(bytes(content))
    except TokenizerError:
        return
    to_json(read_model(tokenizer.serialized), tokenizer.eos_id)
    tokenizer.decode(tokenizer.encode("river"))


def test_other_kinds_of_vocabularies_are_refused() -> None:
    model = read_model(release_like_model())
    model.trainer_spec.model_type = 2
    with pytest.raises(TokenizerError, match="unigram vocabulary is needed"):
        Tokenizer(model.SerializeToString())
    model = read_model(release_like_model())
    model.trainer_spec.byte_fallback = False
    with pytest.raises(TokenizerError, match="byte fallback is needed"):
        Tokenizer(model.SerializeToString())


# -- portable form -------------------------------------------------------------------------------------------


def test_the_portable_form_is_fixed_and_has_exact_scores() -> None:
    tokenizer = exact_tokenizer()
    assert Tokenizer(tokenizer.serialized).serialized == tokenizer.serialized
    model = read_model(tokenizer.serialized)
    assert all(piece.type != PieceType.USER_DEFINED for piece in model.pieces)
    assert all((piece.score * 128).is_integer() for piece in model.pieces)
    assert model.trainer_spec.ByteSize() > 100  # fields that we do not list are kept


# -- streams -------------------------------------------------------------------------------------------------


@BOTH
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_gives_the_decoded_text(make: Any, data: st.DataObject) -> None:
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    continuation = data.draw(st.booleans())
    decoder = IncrementalDecoder(tokenizer, continuation=continuation)
    parts = [decoder.add(token_id) for token_id in ids] + [decoder.finish()]
    assert "".join(parts) == tokenizer.decode(ids, continuation=continuation)
    if make is exact_tokenizer:
        assert "".join(parts) == b"".join(map(tokenizer.piece_bytes, ids)).decode(errors="replace")


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=hard_text)
def test_a_stream_never_shows_half_a_character(make: Any, text: str) -> None:
    tokenizer = make()
    whole = tokenizer.decode(tokenizer.encode(text))
    decoder, shown = IncrementalDecoder(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += decoder.add(token_id)
        assert whole.startswith(shown)
    assert shown + decoder.finish() == whole


def test_bytes_wait_until_the_character_is_certain() -> None:
    tokenizer = exact_tokenizer()
    by_name = {tokenizer.piece(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    decoder = IncrementalDecoder(tokenizer)
    snowman = [by_name[f"<0x{byte:02X}>"] for byte in "☃".encode()]
    assert [decoder.add(token_id) for token_id in snowman] == ["", "", "☃"]
    assert decoder.add(snowman[0]) == ""
    assert decoder.add(by_name["a"]) == "\ufffda"  # certain now that it is no character
    assert (decoder.add(by_name["<0xFF>"]), decoder.add(snowman[0]), decoder.finish()) == ("\ufffd", "", "\ufffd")


def test_the_first_space_goes_once() -> None:
    tokenizer = release_like_tokenizer()
    space, river = tokenizer.encode("", bos=True), tokenizer.encode("river")
    assert tokenizer.piece(river[0]) == META_SPACE + "river"
    assert tokenizer.decode(space + river + river) == "river river"
    assert tokenizer.decode(river, continuation=True) == " river"
    assert tokenizer.decode(tokenizer.encode("  river")) == "  river"


@functools.cache
def cleaning_tokenizer() -> Tokenizer:
    return Tokenizer(release_like_model(remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"))


@settings(max_examples=200, deadline=None)
@given(text=hard_text)
def test_white_space_removal_decodes_as_sentencepiece(text: str) -> None:
    tokenizer = cleaning_tokenizer()
    oracle = sentencepiece_of(tokenizer.serialized)
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == oracle.decode(ids)


# -- context and continuation --------------------------------------------------------------------------------


@BOTH
@settings(max_examples=200, deadline=None)
@given(context=hard_text, continuation=hard_text)
def test_a_split_keeps_the_whole_and_never_leaves_the_continuation_empty(
    make: Any, context: str, continuation: str
) -> None:
    tokenizer = make()
    if not tokenizer.encode(continuation, continuation=True):
        with pytest.raises(TokenizerError, match="has no tokens"):
            split_continuation(tokenizer, context, continuation)
        return
    head, tail = split_continuation(tokenizer, context, continuation)
    assert tail
    assert head + tail == tokenizer.encode(context + continuation)
    if tokenizer.exact:
        before = b"".join(map(tokenizer.piece_bytes, head))
        first = before + tokenizer.piece_bytes(tail[0])
        assert len(before) <= len(context.encode()) < len(first)


def test_a_piece_over_the_boundary_belongs_to_the_continuation() -> None:
    """Where a piece spans words, cutting the whole at the context's own length leaves nothing."""
    tokenizer = release_like_tokenizer()
    context, continuation = "Where is the", " bra"
    whole = tokenizer.encode(context + continuation)
    assert [tokenizer.piece(token_id) for token_id in whole] == ["\u2581Where\u2581is\u2581the\u2581bra"]
    assert whole[len(tokenizer.encode(context)) :] == []
    assert split_continuation(tokenizer, context, continuation) == ([], whole)


def test_splits_at_words() -> None:
    tokenizer = exact_tokenizer()
    head, tail = split_continuation(tokenizer, "the river", " stone")
    assert (tokenizer.decode(head), tokenizer.decode(tail)) == ("the river", " stone")
    # The space at the end of the context is part of the next piece.
    head, tail = split_continuation(tokenizer, "the river ", "stone")
    assert (tokenizer.decode(head), tokenizer.decode(tail)) == ("the river", " stone")
    assert split_continuation(release_like_tokenizer(), "", "river")[0] == []


def test_a_continuation_that_the_vocabulary_drops_is_encoded_alone() -> None:
    tokenizer = cleaning_tokenizer()
    head, tail = split_continuation(tokenizer, "river", " ")
    assert head == tokenizer.encode("river")
    assert tokenizer.decode(tail, continuation=True) == " "


# -- tokenizer.json ------------------------------------------------------------------------------------------


@functools.cache
def library_tokenizer(make: Any) -> tokenizers.Tokenizer:
    document = to_json(read_model(make().serialized), make().eos_id)
    return tokenizers.Tokenizer.from_str(json.dumps(document))


@settings(max_examples=200, deadline=None)
@given(text=hard_text.filter(lambda text: END_OF_TEXT not in text))
def test_the_tokenizers_library_gives_equal_ids_and_text(text: str) -> None:
    tokenizer, other = exact_tokenizer(), library_tokenizer(exact_tokenizer)
    ids = tokenizer.encode(text)
    assert other.encode(text, add_special_tokens=False).ids == ids
    assert other.encode(text).ids == [tokenizer.bos_id, *ids]
    assert other.decode(other.encode(text).ids) == text


def test_the_tokenizers_library_agrees_on_long_text_with_ties() -> None:
    rng = random.Random(0)
    tokenizer, other = exact_tokenizer(), library_tokenizer(exact_tokenizer)
    parts = ["eee", "ooo", "\n\n", "(()", "<0x0A>", "x<unk>", "☃", " the", *("\n" + " " * n for n in range(30))]
    for text in ("".join(rng.choices(parts, k=8000)), made_text(5, 1500)):
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=hard_text.filter(lambda text: not any(name in text for name in (END_OF_TEXT, "<s>", "</s>"))))
def test_the_tokenizers_library_agrees_on_a_dummy_prefix_vocabulary(text: str) -> None:
    tokenizer, other = release_like_tokenizer(), library_tokenizer(release_like_tokenizer)
    ids, others = tokenizer.encode(text), other.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(others) == other.decode(ids) == tokenizer.decode(ids)
    if "<0x" not in text and "<unk>" not in text:  # there a cut may separate what one piece would join
        assert others == ids


@functools.cache
def rebuilt_tokenizer(make: Any) -> Tokenizer:
    return Tokenizer(from_json(to_json(read_model(make().serialized), make().eos_id)))


@BOTH
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tokenizer_json_alone_gives_the_same_ids(make: Any, data: st.DataObject) -> None:
    tokenizer = make()
    rebuilt = rebuilt_tokenizer(make)
    text = data.draw(hard_text)
    assert rebuilt.encode(text) == tokenizer.encode(text)
    assert (rebuilt.eos_id, rebuilt.special_ids, rebuilt.exact) == (
        tokenizer.eos_id,
        tokenizer.special_ids,
        tokenizer.exact,
    )
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert rebuilt.decode(ids) == tokenizer.decode(ids)


def converted_json(**changes: Any) -> dict[str, Any]:
    """As transformers' converter writes a Llama-like vocabulary."""
    model = read_model(release_like_model())
    document = to_json(model, 400)
    document["pre_tokenizer"] = None
    return {**document, **changes}


def test_rules_as_converters_write_them() -> None:
    tokenizer, text = release_like_tokenizer(), "Where is  the bra\n\nadept: <0x0A>"
    metaspace = {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": "first", "split": False}
    for changes in ({}, {"normalizer": None, "pre_tokenizer": metaspace}):
        rebuilt = Tokenizer(from_json(converted_json(**changes)))
        assert rebuilt.encode(text) == tokenizer.encode(text)
        assert rebuilt.eos_id == 400
    never = Tokenizer(
        from_json(converted_json(normalizer=None, pre_tokenizer={**metaspace, "prepend_scheme": "never"}))
    )
    assert never.exact


def test_of_equal_names_the_last_counts() -> None:
    document = converted_json()
    document["model"]["vocab"][1][0] = END_OF_TEXT  # a converter put the bos name at id 1
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] != 1]
    rebuilt = Tokenizer(from_json(document))
    assert rebuilt.eos_id == 400
    assert 1 in rebuilt.special_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "rule that is not understood"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "rule that is not understood"),
        ({"normalizer": None}, "no rule makes it of a space"),
        ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True}}, "Unigram model with byte_fallback"),
        ({"model": None}, "not a tokenizer.json that is understood"),
        ({"added_tokens": [{"id": 5, "content": "x", "special": True}]}, "added token 'x' has id 5"),
        ({"added_tokens": [{"id": 10**9, "content": "x", "special": True}]}, "added token 'x' has id 1000000000"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        from_json(converted_json(**changes))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "Unigram"}}', b"3"])
def test_what_is_no_tokenizer_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = exact_tokenizer()
    tokenizer.save(tmp_path / "new")
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert Tokenizer.load(tmp_path / "new").serialized == tokenizer.serialized
    assert Tokenizer.load(tmp_path / "new" / "tokenizer.model").serialized == tokenizer.serialized
    configuration = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert configuration["bos_token"] == configuration["eos_token"] == END_OF_TEXT
    assert configuration["add_bos_token"] is True
    (tmp_path / "new" / "tokenizer.model").unlink()
    text = made_text(2, 20)
    assert Tokenizer.load(tmp_path / "new").encode(text) == tokenizer.encode(text)


# -- size ----------------------------------------------------------------------------------------------------


def large_model(size: int) -> bytes:
    """The 256 bytes, single letters, and words of four letters."""
    model, letters = new_model(), "abcdefghijklmnopqrstuvwxyz"
    model.trainer_spec.byte_fallback, model.trainer_spec.vocab_size = True, size
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    model.pieces.add(piece="<unk>", type=PieceType.UNKNOWN)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=PieceType.BYTE)
    names = itertools.chain(META_SPACE + letters, map("".join, itertools.product(META_SPACE + letters, repeat=4)))
    for name in itertools.islice(names, size - 258):
        model.pieces.add(piece=name, score=-10 - ord(name[-1]) % 7 / 4)
    model.pieces.add(piece=END_OF_TEXT, type=PieceType.CONTROL)
    return bytes(model.SerializeToString())


@pytest.mark.slow
def test_a_vocabulary_of_the_release_s_size_loads_without_conversion(tmp_path: Path) -> None:
    """Straight into SentencePiece: nobody builds a second, fast form of 262,144 pieces."""
    content = large_model(262_144)
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (262_144, 262_143)
    assert tokenizer.encode("hello world") == sentencepiece_of(content).encode("hello world")


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_loading_imports_no_other_tokenizer_library(file: str, tmp_path: Path) -> None:
    exact_tokenizer().save(tmp_path)
    program = (
        "import sys; from persimmon.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1]); "
        "assert not {'tokenizers', 'transformers', 'torch'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / file)]
    subprocess.run(command, check=True)
