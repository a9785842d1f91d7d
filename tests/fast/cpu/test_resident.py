"""Weights copied into memory of their own are the files' weights, and are chosen where they pay."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import numpy as np
import pytest

from persimmon.checkpoints.directory import open_directory
from persimmon.errors import CheckpointError, InputError, UnavailableError
from persimmon.fast.cpu import resident
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.memory import MemoryPlan
from persimmon.fast.cpu.packed import open_packed
from persimmon.fast.cpu.weights import float_arrays, float_format
from persimmon.infer.decoder import Chunk

GIB = 1 << 30


@pytest.mark.parametrize("form", ["q8", "q4", "p44"])
@pytest.mark.parametrize("verify", [True, False])
def test_the_same_arrays_as_mapped_on_cache_lines(packed: dict[str, Path], form: str, verify: bool) -> None:
    opened = open_packed(packed[form])
    mapped, copied = opened.map(), resident.load_resident(opened, 2, verify=verify)
    assert list(copied) == list(mapped)
    for name, array in mapped.items():
        assert copied[name].dtype == array.dtype and np.array_equal(copied[name], array), name
        assert not copied[name].flags.writeable
    first = [copied[f"layers.{layer}.mlp.{'hot' if form == 'p44' else 'dense_h_to_4h.weight'}"] for layer in (0, 1)]
    assert [array.ctypes.data % 64 for array in first] == [0, 0]


def test_they_decode_to_the_same_bits(packed: dict[str, Path]) -> None:
    logits = []
    for weights in ("mapped", "resident"):
        decoder = load_decoder(packed["p44"], weights=weights)
        assert decoder.weights == weights
        (row,) = decoder.forward([Chunk(decoder.new_sequence(8), [1, 2, 3])])
        logits.append(row)
    assert np.array_equal(*logits)


def test_damage_is_noticed_while_copying(packed: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packed["q4"], tmp_path / "copy")
    for file in sorted((tmp_path / "copy").glob("packed-*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            load_decoder(tmp_path / "copy", weights="resident")
        content[-1] ^= 1
        file.write_bytes(content)


def test_a_file_that_shrinks_after_it_was_opened(packed: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packed["q4"], tmp_path / "copy")
    opened = open_packed(tmp_path / "copy")
    file = sorted((tmp_path / "copy").glob("packed-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file.name} has .* expected"):
        resident.load_resident(opened, 2)
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated: 1 bytes are missing"):
        resident.load_resident(opened, 2, verify=False)


def test_progress_counts_every_byte_once(packed: dict[str, Path]) -> None:
    opened, seen = open_packed(packed["q8"]), []
    resident.load_resident(opened, 2, progress=lambda done, total: seen.append((done, total)))
    assert max(seen) == (sum(opened.sizes.values()), sum(opened.sizes.values()))


@pytest.mark.parametrize(
    ("weights", "free", "offered", "expected"),
    [(8 * GIB, 20 * GIB, True, True), (8 * GIB, 20 * GIB, False, False), (8 * GIB, 8 * GIB, True, False),
     (GIB >> 6, 20 * GIB, True, True), (8 * GIB, None, True, False)],
)  # fmt: skip
def test_auto_takes_large_pages_where_they_pay(
    weights: int, free: int | None, offered: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "memory_available", lambda: free)
    monkeypatch.setattr(resident, "large_pages_offered", lambda: offered)
    plan = MemoryPlan(weights, 0, 0, 512)
    assert resident.choose_weights("auto", plan) is expected
    assert resident.choose_weights("resident", plan) and not resident.choose_weights("mapped", plan)


def test_other_words_are_refused_for_every_directory(packed: dict[str, Path], checkpoint: Path) -> None:
    for directory in (packed["q4"], checkpoint):
        with pytest.raises(InputError, match="weights must be one of auto, mapped, resident, got 'fast'"):
            load_decoder(directory, weights="fast")


def test_memory_that_is_not_given(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(resident.mmap, "mmap", refuse)
    with pytest.raises(UnavailableError, match=r"does not give .* Cannot allocate memory"):
        load_decoder(packed["q4"], weights="resident")
    monkeypatch.undo()
    monkeypatch.setattr(resident, "_arena", lambda size: (_ for _ in ()).throw(UnavailableError("no")))
    monkeypatch.setattr("persimmon.fast.cpu.load.choose_weights", lambda wanted, plan: True)
    assert load_decoder(packed["q4"]).weights == "mapped"  # auto, and nothing is said


def test_unquantized_arrays_are_copied_to_cache_lines(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, places = [], []
    for weights in ("mapped", "resident"):
        decoder = load_decoder(checkpoint, weights=weights)
        assert decoder.weights == weights
        (row,) = decoder.forward([Chunk(decoder.new_sequence(8), [1, 2, 3])])
        logits.append(row)
    assert np.array_equal(*logits)
    opened = open_directory(checkpoint)
    arrays = float_arrays(opened, float_format(opened, "float32"))
    before = dict(arrays)
    copies = resident.copy_resident(arrays)
    assert not arrays and copies.keys() == before.keys()
    for name, array in before.items():
        assert copies[name].dtype == array.dtype and np.array_equal(copies[name], array), name
        places.append(copies[name].ctypes.data % 64 if name != "embed_tokens.weight" else 0)
    assert not any(places)
    monkeypatch.setattr(resident, "_arena", lambda size: (_ for _ in ()).throw(UnavailableError("no")))
    with pytest.raises(UnavailableError, match="no"):
        load_decoder(checkpoint, weights="resident")
    monkeypatch.setattr("persimmon.fast.cpu.load.choose_weights", lambda wanted, plan: True)
    assert load_decoder(checkpoint).weights == "mapped"
