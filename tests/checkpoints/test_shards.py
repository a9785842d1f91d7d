"""Our safetensors files against the reference library, and damaged ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from persimmon.checkpoints import shards
from persimmon.checkpoints.tensors import WEIGHT_TYPES, ByteTensor, Concatenation, StoredTensor, num_bytes
from persimmon.errors import CheckpointError, NotFoundError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(5, dtype=torch.float64),
    "half": torch.randn(2, 3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def content(tensor: StoredTensor | Concatenation) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor.chunks())


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in shards.read_file(tmp_path / "x.safetensors")}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert content(found[name]) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    shards.write_file(tmp_path / "y.safetensors", shards.read_file(tmp_path / "x.safetensors"))
    loaded = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_data_begins_at_a_cache_line(tmp_path: Path) -> None:
    shards.write_file(tmp_path / "x.safetensors", [ByteTensor("t", b"abc")])
    assert shards.read_file(tmp_path / "x.safetensors")[0].offset % 64 == 0


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    digest = shards.write_file(tmp_path / "x.safetensors", [ByteTensor("t", b"abc" * 1000)])
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_rows_and_concatenation(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    tensor = next(t for t in shards.read_file(tmp_path / "x.safetensors") if t.name == "a")
    joined = Concatenation("a", (tensor.rows(2, 3), tensor.rows(0, 1)))
    assert joined.shape == (2, 4)
    assert content(joined) == TENSORS["a"][[2, 0]].numpy().tobytes()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 60))
def test_split_keeps_order_and_size(sizes: list[int], limit: int) -> None:
    tensors = [ByteTensor(str(i), bytes(size)) for i, size in enumerate(sizes)]
    groups = shards.split(tensors, limit)
    assert [tensor for group in groups for tensor in group] == tensors
    assert all(groups) and all(len(group) == 1 or sum(map(num_bytes, group)) <= limit for group in groups)


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = [ByteTensor(f"t{i}", bytes([i]) * 100) for i in range(5)]
    seen: list[tuple[int, int]] = []
    shards.write_checkpoint(tmp_path, tensors, max_shard_bytes=250, progress=lambda *args: seen.append(args))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / shards.INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 500, "total_parameters": 500}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    assert seen[-1] == (500, 500)


# -- damage --------------------------------------------------------------------------------------------------


def rewrite_header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(dtype="F33"), "a: unknown dtype 'F33'"),
        (lambda h: h["a"].update(shape=[3, 5]), r"takes 60 bytes, data_offsets give it 48"),
        (lambda h: h["a"].update(shape=[-3, -4]), "shape must be"),
        (lambda h: h["a"].update(shape="34"), "shape must be"),
        (lambda h: h["a"].update(shape=[True, 12]), "shape must be"),
        (lambda h: h["a"].update(data_offsets=[0]), "two offsets"),
        (lambda h: h["a"].update(extra=1), "must give"),
        (lambda h: h.pop("a"), "should begin at byte"),
        (lambda h: h.update(z=dict(h["a"])), "should begin at byte"),
        (lambda h: h.update(a=[]), "must give"),
    ],
)
def test_wrong_headers_are_named(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    rewrite_header(file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        shards.read_file(file)
    assert str(file) in str(caught.value)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    entry = '"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f"{{{entry},{entry}}}".encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(CheckpointError, match="'t' stands twice"):
        shards.read_file(file)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"x\.safetensors"):
        shards.read_file(tmp_path / "x.safetensors")
    for data in (b"", b"1234567", b"not a safetensors file at all", bytes(100), b"\xff" * 64):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            shards.read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "weight_map", [{}, [], {"a": ""}, {"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {"a": "b\0c"}]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, weight_map: Any) -> None:
    file = tmp_path / shards.INDEX_FILE
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"weight_map|not a file name"):
        shards.read_index(file)


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_never_read_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any flipped header byte or truncation: refused, or the same tensors as before (spaces, metadata)."""
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    before = shards.read_file(file)
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError):
            shards.read_file(file)
        return
    position, value = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    file.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
    try:
        after = shards.read_file(file)
    except CheckpointError:
        return
    # What passes has the same places, and no weight type became another one. Names are the directory check's matter.
    assert [(t.offset, num_bytes(t)) for t in after] == [(t.offset, num_bytes(t)) for t in before]
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype or other.dtype not in WEIGHT_TYPES
        assert one.shape == other.shape or num_bytes(one) == 0


def test_the_library_agrees_on_what_is_whole(tmp_path: Path) -> None:
    """Every truncation that the reference library refuses is refused here too."""
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        with pytest.raises(SafetensorError):
            load(whole[:end])
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            shards.read_file(file)
