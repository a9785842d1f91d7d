"""Adapters on disk: round trip, refusals by name, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from made_adapters import save, write_random_adapter
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, open_adapter, tensor_name
from persimmon.checkpoints.checksums import verify_checksums
from persimmon.checkpoints.merging import merge
from persimmon.cli.main import main
from persimmon.errors import CheckpointError, InputError, NotFoundError
from persimmon.tokenizer import Tokenizer
from tiny_directory import write_tiny_directory
from tiny_model import tiny_config, tiny_ids

CARD = "---\nlicense: cc-by-nc-4.0\n---\n\n# chat\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_directory(tmp_path / "base", dtype=torch.float32)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    write_random_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_names_are_pefts() -> None:
    assert (
        tensor_name("layers.3.self_attn.query_key_value", "A")
        == "base_model.model.model.layers.3.self_attn.query_key_value.lora_A.weight"
    )
    assert (
        tensor_name("layers.10.mlp.dense_4h_to_h", "B")
        == "base_model.model.model.layers.10.mlp.dense_4h_to_h.lora_B.weight"
    )


@pytest.mark.parametrize(
    "settings",
    [LoraSettings(rank=3, alpha=5), LoraSettings(rank=8, alpha=4, rslora=True, dropout=0.1, targets=("dense",))],
    ids=["all", "one"],
)
def test_round_trip(base: Path, tmp_path: Path, settings: LoraSettings) -> None:
    model = write_random_adapter(base, tmp_path / "adapter", settings)
    opened = open_adapter(tmp_path / "adapter", model.config)
    assert opened.settings == settings
    assert opened.base == str(base)
    again = hub.load_model(base, dtype=torch.float32)
    lora.load_adapter(again, tmp_path / "adapter")
    first, second = lora.adapter_tensors(model), lora.adapter_tensors(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = tiny_ids(model.config, 1, 9)
    assert torch.equal(model(ids), again(ids))


def change_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in document.items() if value != "DELETE"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"rank_pattern": {"dense": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"target_modules": ["q_proj"]}, "unknown target module 'q_proj'"),
        ({"target_modules": ".*dense"}, "target_modules must be a list"),
        ({"target_modules": ["dense"]}, "belongs to no module"),
        ({"layers_to_transform": [7]}, "layer 7 is adapted"),
        ({"layers_to_transform": [0]}, r"layers\.1\..* belongs to no module"),
        ({"r": 2}, r"lora_A\.weight is F32 \[4, 16\], the base model needs \[2, 16\]"),
        ({"r": "DELETE"}, "r is missing"),
        ({"r": "4"}, "wrong type"),
        ({"lora_alpha": -1}, r"lora\.alpha must be positive"),
        ({"something_new": 3}, "something_new 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configurations_that_mean_another_model_are_refused(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(adapter, tiny_config())


def test_what_changes_nothing_is_accepted(adapter: Path) -> None:
    change_config(adapter, use_dora=False, modules_to_save=None, peft_version="9", target_modules="all-linear")
    assert open_adapter(adapter, tiny_config()).settings.rank == 4


def test_missing_and_misshapen_tensors_are_named(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.dense_h_to_4h.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        open_adapter(adapter, tiny_config())
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is F32 \[63, 4\], the base model needs \[64, 4\]"):
        open_adapter(adapter, tiny_config())
    save_file(tensors | {name: tensors[name].int()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is I32"):
        open_adapter(adapter, tiny_config())


def test_an_adapter_of_another_shape_is_refused(adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the base model needs \[4, 32\]"):
        open_adapter(adapter, tiny_config(hidden_size=32))
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is missing"):
        open_adapter(adapter, tiny_config(num_layers=3))


def test_directories_that_are_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"has no adapter_config\.json"):
        open_adapter(base, tiny_config())
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"has no adapter_model\.safetensors"):
        open_adapter(adapter, tiny_config())
    model = hub.load_model(base, dtype=torch.float32)
    lora.attach(model, LoraSettings(rank=1))
    with pytest.raises(InputError, match="holds a model"):
        save(model, LoraSettings(rank=1), base, base)


@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [
        (torch.float32, None, 1e-4),
        (torch.bfloat16, torch.float32, 1e-4),
        # rounding the merged matrices to bfloat16 moves each by up to 2^-9 of itself
        (torch.bfloat16, None, 0.1),
    ],
    ids=["float32", "bfloat16-to-float32", "bfloat16"],
)
def test_merged_logits_are_the_unmerged_ones(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None, tolerance: float
) -> None:
    base = write_tiny_directory(tmp_path / "base", dtype=stored)
    model = write_random_adapter(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    merged = hub.load_model(tmp_path / "merged", dtype=torch.float32)
    ids = tiny_ids(model.config, 2, 16)
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids), model(ids), rtol=tolerance, atol=tolerance)
        plain = hub.load_model(base, dtype=torch.float32)(ids)
        assert (merged(ids) - plain).abs().max() > 0.5
    assert verify_checksums(tmp_path / "merged")
    assert Tokenizer.load(tmp_path / "merged").vocab_size == Tokenizer.load(base).vocab_size


def test_slices_of_a_merged_matrix_are_the_whole(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("persimmon.checkpoints.merging._SLICE_BYTES", 4 * 64 * 3)
    merge(base, adapter, tmp_path / "sliced")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "sliced"))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


def test_the_licence_of_the_chat_weights_stays(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "README.md").write_text(CARD)
    write_random_adapter(base, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "non-commercial" in card
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    shown = capsys.readouterr()
    assert "non-commercial" in shown.err and "CC-BY-NC-4.0" in shown.out
    merged = (tmp_path / "merged" / "README.md").read_text()
    assert merged.startswith(CARD) and "non-commercial use only, too" in merged


def test_the_verb_merges_and_refuses(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    assert main(["merge", str(base), str(adapter), str(target), "--dtype", "bfloat16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dtype"] == "bfloat16" and facts["adapter_parameters"] == 2 * 4 * 16 * (4 + 2 + 5 + 5)
    assert main(["merge", str(base), str(adapter), str(target)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["merge", str(base), str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "is no adapter" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["quantize", str(base), str(tmp_path / "q8"), "--format", "q8", "--quiet"]) == 0
    assert main(["merge", str(tmp_path / "q8"), str(adapter), str(tmp_path / "other")]) == 2
    assert "is quantized; merge into the model it was made from" in capsys.readouterr().err


def test_generate_takes_an_adapter(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for engine in ("reference", "cpu"):
        words = ["generate", str(base), "--prompt", "the", "--max-tokens", "8", "--temperature", "0", "--json"]
        assert main([*words, "--adapter", str(adapter), "--engine", engine]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1]


def test_an_adapter_replaces_its_own_files_alone(base: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_random_adapter(base, tmp_path / "adapter", seed=seed)
        (tmp_path / "adapter" / "tokenizer.json").write_text("somebody's")
    written = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    write_random_adapter(base, tmp_path / "adapter", seed=2)
    assert (tmp_path / "adapter" / "tokenizer.json").read_text() == "somebody's"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != written
