"""A prompt on disk: read by the model once, the same bits afterwards, and refused whenever anything differs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cpu_decoders import cpu_decoder
from persimmon.api import Persimmon
from persimmon.errors import InputError, NotFoundError, PersimmonError, PromptFileError, StorageError, UnavailableError
from persimmon.infer.decoder import Chunk, Decoder, Logits
from persimmon.infer.prompt_file import check_place
from persimmon.infer.reference import ReferenceDecoder
from persimmon.infer.session import Session
from scripted_decoder import ScriptedDecoder
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

MODEL = tiny_model(hidden_size=64, num_heads=4, max_positions=512)
IDS = np.random.default_rng(0).integers(3, 300, 200).tolist()

DECODERS: dict[str, Callable[..., Decoder]] = {
    "reference": lambda model: ReferenceDecoder(model),
    "reference, bfloat16": lambda model: ReferenceDecoder(tiny_model(hidden_size=64, num_heads=4).bfloat16()),
    "cpu": lambda model: cpu_decoder(model),
    "cpu, int8": lambda model: cpu_decoder(model, kv_dtype="int8"),
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return DECODERS[request.param](MODEL)


def counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every call from now on."""
    sizes: list[int] = []
    forward = decoder.forward

    def count(chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        sizes.append(sum(len(chunk.token_ids) for chunk in chunks))
        return forward(chunks, exact_top=exact_top)

    monkeypatch.setattr(decoder, "forward", count)
    return sizes


def saved(decoder: Decoder, path: Path, ids: Sequence[int] = IDS) -> Logits:
    """Write a prompt file; the logits behind the prompt."""
    session = Session(decoder, 512)
    logits = session.prefill(ids)
    session.save(path)
    return logits


def test_a_prompt_is_read_once(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "document"
    model = Persimmon(decoder, tiny_tokenizer(), context=512)
    plain = model.generate(IDS, max_tokens=8, temperature=0.0, logprobs=1)
    sizes = counted(decoder, monkeypatch)
    first = model.generate(IDS, max_tokens=8, temperature=0.0, logprobs=1, prompt_cache=path)
    assert sum(sizes) == len(IDS) + len(first.token_ids) - 1 and first.usage.cached_tokens == 0
    written = path.stat().st_mtime_ns
    sizes.clear()
    again = model.generate(IDS, max_tokens=8, temperature=0.0, logprobs=1, prompt_cache=path)
    assert sizes[0] == 1 and sum(sizes) == len(again.token_ids)
    assert again.usage.cached_tokens == len(IDS) - 1
    assert again.token_ids == first.token_ids == plain.token_ids
    if "cpu" in decoder.name:
        assert again.logprobs == plain.logprobs, "to the last bit"
    sizes.clear()
    model.generate([*IDS, 5, 6, 7], max_tokens=1, temperature=0.0, prompt_cache=path)
    assert sizes == [3], "another question about the same document"
    assert path.stat().st_mtime_ns == written, "and the file is not written again"
    assert not list(tmp_path.glob(".*"))


def test_save_prompt_prepares_a_file(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Persimmon(decoder, tiny_tokenizer(), context=512)
    text = "the story of light " * 8
    count = model.save_prompt(text, tmp_path / "p")
    sizes = counted(decoder, monkeypatch)
    result = model.generate(text, max_tokens=1, prompt_cache=tmp_path / "p")
    assert sizes == [1] and result.usage.prompt_tokens == count


@pytest.mark.parametrize("length", [1, 15, 16, 100, 199])
def test_a_beginning_goes_on_to_the_last_bit(decoder: Decoder, length: int, tmp_path: Path) -> None:
    """A prompt that shares only its first tokens with the file."""
    saved(decoder, tmp_path / "p")
    ids = [*IDS[:length], IDS[length] + 1, *reversed(IDS)]
    fresh, restored = Session(decoder, 512), Session(decoder, 512)
    fresh.prefill(IDS)
    assert restored.restore(tmp_path / "p", ids) == length
    np.testing.assert_array_equal(restored.prefill(ids), fresh.prefill(ids))
    assert restored.reused == length


def test_what_a_session_has_is_not_replaced_by_less(decoder: Decoder, tmp_path: Path) -> None:
    saved(decoder, tmp_path / "p", IDS[:50])
    session = Session(decoder, 512)
    session.prefill(IDS)
    assert session.restore(tmp_path / "p", IDS) == 50
    session.prefill(IDS)
    assert session.reused == len(IDS) - 1


def test_another_document_takes_the_place(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(decoder, tmp_path / "p")
    model = Persimmon(decoder, tiny_tokenizer(), context=512)
    other = [*IDS[:80], *reversed(IDS)]
    model.generate(other, max_tokens=1, prompt_cache=tmp_path / "p")
    sizes = counted(decoder, monkeypatch)
    model.generate(other, max_tokens=1, prompt_cache=tmp_path / "p")
    assert sizes == [1]


def test_damaged_files_are_refused_wherever_the_damage_is(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "p"
    saved(decoder, path)
    content = path.read_bytes()
    dice = np.random.default_rng(1)
    places = [0, 9, 100, len(content) - 1, *dice.integers(0, len(content), 40)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        session = Session(decoder, 512)
        # A space may have become another one in the header's padding; what is used is then still what was saved.
        try:
            found = session.restore(path, IDS)
        except PromptFileError as error:
            assert str(path) in str(error)
            assert session.token_ids == []
        else:
            header = 8 + int.from_bytes(content[:8], "little")
            assert place < header and found == len(IDS)
    for size in (0, 5, 8, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(PromptFileError, match="cannot be used"):
            Session(decoder, 512).restore(path, IDS)
    path.write_bytes(content + b"x")
    with pytest.raises(PromptFileError, match="cut off or is damaged"):
        Session(decoder, 512).restore(path, IDS)


def written_with(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_hostile_headers_are_refused(tmp_path: Path) -> None:
    decoder = cpu_decoder(MODEL)
    deep = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(PromptFileError, match="not a prompt file"):
        Session(decoder, 512).restore(written_with(tmp_path / "deep", deep), IDS)
    saved(decoder, tmp_path / "p")
    content = (tmp_path / "p").read_bytes()
    size = int.from_bytes(content[:8], "little")
    for name, change in (("token_ids", 2), ("checksums", 2), ("checksums", 3)):
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        later = False
        for tensor, entry in header.items():
            if tensor != "__metadata__":  # the tensor is longer, those behind it begin later
                entry["data_offsets"] = [
                    offset + change * (later or (tensor == name and number == 1))
                    for number, offset in enumerate(entry["data_offsets"])
                ]
                later = later or tensor == name
        path = written_with(tmp_path / "odd", json.dumps(header).encode(), data + bytes(change))
        with pytest.raises(PromptFileError, match="its header is damaged"):
            Session(decoder, 512).restore(path, IDS)


def test_a_place_where_no_file_can_be_shows_before_the_model_runs(tmp_path: Path) -> None:
    model = Persimmon(ScriptedDecoder(lambda ids: pytest.fail("the model ran")), tiny_tokenizer(), context=64)
    for place, message in ((tmp_path, "Is a directory"), (tmp_path / "no" / "p", "No such file")):
        with pytest.raises(StorageError, match=f"cannot be written: {message}"):
            model.generate(IDS[:5], max_tokens=1, prompt_cache=place)
    check_place(tmp_path / "p")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    saved(cpu_decoder(MODEL), path)
    others: dict[str, Decoder] = {
        "by another engine": ReferenceDecoder(MODEL),
        "with other weights": cpu_decoder(tiny_model(1, hidden_size=64, num_heads=4, max_positions=512)),
        "of another type": cpu_decoder(MODEL, kv_dtype="int8"),
    }
    other = tiny_model(hidden_size=64, num_heads=4, max_positions=512)
    other.config = other.config.replace(rotary_precision="bfloat16")
    others["with another rotary precision"] = cpu_decoder(other)
    for message, decoder in others.items():
        with pytest.raises(PromptFileError, match=message):
            Session(decoder, 512).restore(path, IDS)
    path.write_text("a letter to a friend, long enough to be something")
    with pytest.raises(PromptFileError, match="not a prompt file"):
        Session(cpu_decoder(MODEL), 512).restore(path, IDS)
    with pytest.raises(NotFoundError, match="no prompt file"):
        Session(cpu_decoder(MODEL), 512).restore(tmp_path / "none", IDS)
    assert issubclass(PromptFileError, InputError) and issubclass(StorageError, PersimmonError)


def test_files_of_the_former_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    saved(cpu_decoder(MODEL, kv_dtype="int8"), path)
    former = path.read_bytes().replace(b'"version": "2"', b'"version": "1"')
    assert former != path.read_bytes()
    path.write_bytes(former)
    with pytest.raises(PromptFileError, match="not a prompt file of this version"):
        Session(cpu_decoder(MODEL, kv_dtype="int8"), 512).restore(path, IDS)


def test_one_changed_weight_is_another_model() -> None:
    changed = tiny_model(hidden_size=64, num_heads=4, max_positions=512)
    changed.layers[1].mlp.dense_4h_to_h.weight.data[3, 7] += 1e-3
    for make in (ReferenceDecoder, cpu_decoder):
        assert make(changed).identity["weights"] != make(MODEL).identity["weights"]
        assert make(MODEL).identity == make(MODEL).identity


def test_a_full_disk_leaves_the_old_file(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    saved(decoder, path)
    old = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        saved(decoder, path, IDS[::-1])
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        saved(decoder, tmp_path / "nowhere" / "p")


def test_engines_that_cannot_say_so(tmp_path: Path) -> None:
    session = Session(ScriptedDecoder(lambda ids: 5), 64)
    session.prefill([1, 2, 3])
    with pytest.raises(UnavailableError, match="cannot keep prompts"):
        session.save(tmp_path / "p")
