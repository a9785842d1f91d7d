"""Model directories: what is written, and that nothing wrong is ever opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from made_checkpoints import made_config, made_model, made_tokenizer, same_tensors
from persimmon.checkpoints.checksums import verify_checksums
from persimmon.checkpoints.directory import open_directory, read_config
from persimmon.checkpoints.hub import load_model, save_model
from persimmon.checkpoints.staging import check_target
from persimmon.errors import CheckpointError, InputError, NotFoundError, PersimmonError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer

FILES = {
    "checksums.json", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
}  # fmt: skip

QKV = "model.layers.1.self_attn.query_key_value.weight"


def test_a_directory_has_everything(directory: Path, model: PersimmonModel, tokenizer: Tokenizer) -> None:
    assert {file.name for file in directory.iterdir()} == FILES
    opened = open_directory(directory)
    assert opened.config == model.config
    assert opened.dtype == "bfloat16"
    assert list(opened.tensors) == list(model.state_dict())
    assert Tokenizer.load(directory).serialized == tokenizer.serialized
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    assert not list(directory.parent.glob(".*"))


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def change_config(**changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda t: t.pop(QKV)), rf"{QKV} is missing"),
        (change_weights(lambda t: t.update(stray=torch.zeros(2))), r"stray \(F32 \[2\]\) is no part of the model"),
        (change_weights(lambda t: t.update({QKV: torch.zeros(16, 48)})), rf"{QKV} should be \[48, 16\].*\[16, 48\]"),
        (change_weights(lambda t: t.update({QKV: torch.zeros(48, 16, dtype=torch.int8)})), rf"{QKV} is I8"),
        (change_config(num_hidden_layers=3), r"model\.layers\.2\.\S+ is missing.*more"),
        (change_config(num_hidden_layers=1), r"model\.layers\.1\.\S+ .* is no part of the model"),
        (change_config(num_hidden_layers=10**9), r"1000000000 layers expected, only 36 tensors"),
        (change_config(vocab_size=300), r"model\.embed_tokens\.weight should be \[300, 16\].*\[294, 16\]"),
        (change_config(num_attention_heads=4), r"q_layernorm\.weight should be \[4\].*\[8\]"),
        (change_config(qk_layernorm=False), r"q_layernorm\.weight .* is no part"),
        (change_config(hidden_act="gelu"), r"config\.json: hidden_act"),
        (change_config(eos_token_id=999), r"config\.json: .*outside the vocabulary"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), r"'a' stands twice"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: not valid JSON"),
    ],
)
def test_what_does_not_fit_is_named(directory: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(directory)
    assert str(directory) in str(caught.value)


def test_missing_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        open_directory(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"neither model\.safetensors nor"):
        open_directory(directory)
    (directory / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        read_config(directory)


def test_rotary_buffers_of_old_files_are_ignored(directory: Path, model: PersimmonModel) -> None:
    change_weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))(directory)
    assert same_tensors(load_model(directory), model)


# -- shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(model, tokenizer, tmp_path / "sharded", max_shard_bytes=10_000)
    return tmp_path / "sharded"


def test_shards_load_as_one(sharded: Path, model: PersimmonModel) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) == 3
    assert same_tensors(load_model(sharded), model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        load_model(sharded)


def test_shards_must_hold_what_the_index_says(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match=r"model-00002.*does not hold what"):
        load_model(sharded)


def test_an_index_entry_cannot_move(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "model-00002-of", 1))
    with pytest.raises(CheckpointError, match="does not hold what"):
        load_model(sharded)


# -- damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PersimmonModel]:
    """A sharded model of one layer, to be damaged and repaired."""
    tokenizer = made_tokenizer()
    model = made_model(made_config(tokenizer, num_layers=1))
    directory = tmp_path_factory.mktemp("victim") / "model"
    save_model(model, tokenizer, directory, max_shard_bytes=20_000)
    return directory, model


@settings(max_examples=300)
@given(st.data())
def test_damage_is_refused_or_harmless(victim: tuple[Path, PersimmonModel], data: st.DataObject) -> None:
    """Truncated anywhere, or one byte changed in headers and index: an error, or exactly the same model."""
    directory, model = victim
    file = data.draw(st.sampled_from(sorted(directory.glob("model*"))))
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        header = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else len(whole)
        position = data.draw(st.integers(0, header - 1))
        damaged = whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]
    try:
        file.write_bytes(damaged)
        loaded = load_model(directory)
    except PersimmonError as error:
        assert str(directory) in str(error)
    else:
        assert same_tensors(loaded, model)
    finally:
        file.write_bytes(whole)


def test_checksums_find_what_structure_does_not(directory: Path) -> None:
    assert verify_checksums(directory) == len(FILES) - 1
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    load_model(directory)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or was changed"):
        verify_checksums(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify_checksums(directory)


def test_checksum_lists_may_be_absent_but_not_broken(directory: Path) -> None:
    for text in ("[]", '{"files": {"a": {}}}', '{"files": 3}'):
        (directory / "checksums.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a list of checksums"):
            verify_checksums(directory)
    (directory / "checksums.json").unlink()
    assert verify_checksums(directory) is None


# -- writing -------------------------------------------------------------------------------------------------


def test_replacing_keeps_other_files_and_leaves_no_stale_ones(
    sharded: Path, model: PersimmonModel, tokenizer: Tokenizer
) -> None:
    (sharded / "README.md").write_text("mine")
    other = made_model(model.config, seed=1)
    save_model(other, tokenizer, sharded)
    assert {file.name for file in sharded.iterdir()} == FILES | {"README.md"}
    assert same_tensors(load_model(sharded), other)


def test_a_failed_write_leaves_the_old_model(
    directory: Path, model: PersimmonModel, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    def fail(self: Tokenizer, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(made_model(model.config, seed=1), tokenizer, directory)
    assert same_tensors(load_model(directory), model)
    assert [file.name for file in directory.parent.iterdir()] == ["model"]


def test_a_crash_while_replacing_leaves_no_mixture(
    directory: Path, model: PersimmonModel, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    import os

    replaced: list[str] = []
    real = os.replace

    def crash(source: Path, target: Path) -> None:
        if Path(target).parent == directory.resolve():
            if len(replaced) == 2:
                raise KeyboardInterrupt
            replaced.append(str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model(made_model(model.config, seed=1), tokenizer, directory)
    monkeypatch.undo()
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        load_model(directory)


def test_wrong_tensors_are_not_written(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tensors = model.state_dict()
    for change, message in (
        ({"lm_head.weight": tensors["lm_head.weight"][:-1]}, r"lm_head\.weight should be \[294, 16\]"),
        ({"stray": torch.zeros(1)}, "stray is no part"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_model({**tensors, **change}, tokenizer, tmp_path / "out", config=model.config)
    tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        save_model(tensors, tokenizer, tmp_path / "out", config=model.config)
    with pytest.raises(InputError, match="int8"):
        save_model({"a": torch.zeros(1, dtype=torch.int8)}, None, tmp_path / "out", config=model.config)
    with pytest.raises(InputError, match="config"):
        save_model(tensors, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_must_fit(model: PersimmonModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="295 pieces, the model 294 rows"):
        save_model(model, made_tokenizer(unused=[280]), tmp_path / "out")
    config = made_config(made_tokenizer(unused=[0]), eos_token_id=5)
    with pytest.raises(CheckpointError, match=r"id 2, config\.json says 5"):
        save_model(made_model(config), made_tokenizer(unused=[0]), tmp_path / "out")


def test_a_file_is_no_directory(model: PersimmonModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_model(model, None, tmp_path / "file")


def test_verbs_do_not_write_into_used_directories(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        check_target(directory, overwrite=False)
    check_target(directory, overwrite=True)
    check_target(tmp_path / "new", overwrite=False)
