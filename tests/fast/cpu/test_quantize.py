"""Packed directories: written in bounded steps, resumed, and refused when anything is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.checkpoints import hub
from persimmon.errors import CheckpointError, InputError, NotFoundError, PersimmonError
from persimmon.fast.cpu import quantize as module
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.packed import open_packed, planned_bytes
from persimmon.fast.cpu.packing import Packer, largest_columns
from persimmon.fast.cpu.quantize import quantize


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_description_and_sizes(packed: dict[str, Path]) -> None:
    opened = open_packed(packed["p44"])
    document = json.loads((packed["p44"] / "quantization.json").read_text())
    assert document["format"] == opened.form.name == "p44"
    assert len(document["files"]) == opened.config.num_layers + 2
    stored = sum(file["bytes"] for file in document["files"].values())
    assert 0 <= stored - planned_bytes(opened.config, opened.form, "BF16") < 10_000  # headers


def test_threads_do_not_change_the_files(checkpoint: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "again", "p44", threads=1)
    assert contents(tmp_path / "again") == contents(packed["p44"])


def test_progress_reaches_the_end(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(checkpoint, tmp_path / "out", "q8", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("fail_at", [0, 1])
def test_an_interrupted_run_goes_on(
    fail_at: int, checkpoint: Path, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    layer = Packer.layer
    packed_layers: list[int] = []

    def failing(self: Packer, index: int) -> dict:
        if index == fail_at and not packed_layers.count(-1):
            packed_layers.append(-1)
            raise KeyboardInterrupt
        packed_layers.append(index)
        return layer(self, index)

    monkeypatch.setattr(Packer, "layer", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, target, "p44")
    assert not target.exists()
    quantize(checkpoint, target, "p44")
    assert contents(target) == contents(packed["p44"])
    assert [index for index in packed_layers if index >= 0] == [0, 1]  # nothing was packed twice


def test_other_settings_start_anew(
    checkpoint: Path, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Packer, "head", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(checkpoint, target, "q4")
    quantize(checkpoint, target, "p44")
    assert contents(target) == contents(packed["p44"])


def test_a_target_in_use_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        quantize(checkpoint, tmp_path, "q8")
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_unknown_formats_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be one of q8, q4, p44, got 'q5'"):
        quantize(checkpoint, tmp_path / "out", "q5")


def test_measured_outliers_are_used(checkpoint: Path, tmp_path: Path) -> None:
    columns = {0: np.arange(16, dtype=np.int32), 1: np.arange(16, 32, dtype=np.int32)}
    quantize(checkpoint, tmp_path / "out", "p44", outliers=columns)
    arrays = open_packed(tmp_path / "out").map()
    assert np.array_equal(arrays["layers.1.mlp.outlier_columns"], columns[1])


def test_outliers_by_norm_gain() -> None:
    energy = np.ones(100, np.float32)
    energy[[3, 50, 99]] = 9.0
    assert {3, 50, 99} <= set(largest_columns(energy).tolist())
    assert largest_columns(np.ones(3, np.float32)).tolist() == [0, 1, 2] + [-1] * 13


def test_sources_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = hub.load_model(checkpoint)
    with torch.no_grad():
        model.layers[1].mlp.dense_4h_to_h.weight[3, 5] = float("nan")
    hub.save_model(model, None, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.dense_4h_to_h.* not finite"):
        quantize(tmp_path / "bad", tmp_path / "out", "p44")


# -- damage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(packed: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(packed["p44"], tmp_path / "copy")
    return tmp_path / "copy"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(copy: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(copy.glob("packed-*.safetensors"))))
    content = bytearray(file.read_bytes())
    where, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[where] ^= 1 << bit
    file.write_bytes(content)
    try:
        with pytest.raises(PersimmonError):
            load_decoder(copy)
    finally:
        content[where] ^= 1 << bit
        file.write_bytes(content)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_is_noticed_without_verification(copy: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(copy.glob("packed-*.safetensors"))))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(CheckpointError, match=f"{file.name} is truncated"):
            load_decoder(copy, verify=False)
    finally:
        file.write_bytes(content)


def test_missing_files_and_foreign_descriptions_are_named(copy: Path) -> None:
    description = copy / "quantization.json"
    document = json.loads(description.read_text())
    for change, message in (
        ({"version": 3}, "layout version 3 of p44; this program reads version 2: quantize the model again"),
        ({"format": "p55"}, "unknown format 'p55'"),
        ({"files": {}}, "lists 0 files, 4 expected"),
        ({"files": None}, "malformed"),
    ):
        description.write_text(json.dumps({**document, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_decoder(copy)
    description.write_text(json.dumps(document))
    (copy / "packed-00002-of-00004.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"packed-00002-of-00004\.safetensors is missing"):
        load_decoder(copy)


@pytest.mark.parametrize(("form", "old", "now"), [("q8", 1, 2), ("q4", 1, 3), ("q4", 2, 3), ("p44", 1, 2)])
def test_older_layouts_are_to_be_made_anew(
    form: str, old: int, now: int, packed: dict[str, Path], tmp_path: Path
) -> None:
    """Their planes were 4 and 4 bits, and the down projection of the first q4 was dense."""
    shutil.copytree(packed[form], tmp_path / "old")
    description = tmp_path / "old" / "quantization.json"
    document = json.loads(description.read_text())
    assert document["version"] == now
    description.write_text(json.dumps({**document, "version": old}))
    with pytest.raises(
        CheckpointError, match=f"layout version {old} of {form}; this program reads version {now}: quantize the model"
    ):
        load_decoder(tmp_path / "old")


def test_a_configuration_of_another_shape_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 601}))
    with pytest.raises(CheckpointError, match=r"mlp\.hot should be U8 \[601, "):
        load_decoder(copy)


def test_resume_record_is_not_left_behind(packed: dict[str, Path]) -> None:
    assert not (packed["p44"] / "progress.json").exists()
    assert module.PACKED_FILE in contents(packed["p44"])
