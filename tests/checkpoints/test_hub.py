"""Loading and saving models: exact in both directions, lazily, in the memory that the weights take."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from made_checkpoints import made_config, made_model, same_tensors
from persimmon.checkpoints import names
from persimmon.checkpoints.convert import compare, write_copy
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.hub import load_model, save_model
from persimmon.errors import CheckpointError, InputError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 7_000, 1])
def test_round_trip_is_exact(tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    model = made_model(made_config(tokenizer), dtype=dtype)
    save_model(model, tokenizer, tmp_path / "a", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "a")
    assert same_tensors(loaded, model)
    save_model(loaded, tokenizer, tmp_path / "b", max_shard_bytes=max_shard_bytes)
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {file.name for file in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_copies_are_exact(directory: Path, model: PersimmonModel, tmp_path: Path) -> None:
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    source = open_directory(directory)
    _, notes = write_copy(source, tmp_path / "copy", max_shard_bytes=5_000)
    assert notes == []
    assert same_tensors(load_model(tmp_path / "copy"), model)
    result = compare(source.tensors, open_directory(tmp_path / "copy").tensors)
    assert (result.equal, result.differing) == (36, {})
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "README.md"):
        assert (tmp_path / "copy" / name).read_bytes() == (directory / name).read_bytes()


def test_comparison_names_what_differs(directory: Path, model: PersimmonModel, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["layers.1.mlp.dense_h_to_4h.bias"][3] += 1
    save_model(tensors, None, tmp_path / "other", config=model.config)
    first, second = open_directory(directory).tensors, open_directory(tmp_path / "other").tensors
    result = compare(first, second)
    assert result.differing == {"layers.1.mlp.dense_h_to_4h.bias": "different values"}
    del second["lm_head.weight"]
    assert compare(first, second).differing["lm_head.weight"] == "only in one of them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_on_loading_and_saving(
    directory: Path, model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype
) -> None:
    widened = load_model(directory, dtype=dtype)
    assert same_tensors(widened, made_model(model.config, dtype=torch.bfloat16).to(dtype))
    save_model(widened, tokenizer, tmp_path / "narrow", dtype=torch.bfloat16)
    assert same_tensors(load_model(tmp_path / "narrow"), model)
    write_copy(open_directory(directory), tmp_path / "wide", dtype=dtype)
    assert same_tensors(load_model(tmp_path / "wide"), widened)


def test_pytorch_files_load(directory: Path, model: PersimmonModel) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert same_tensors(load_model(directory), model)


def test_float16_files_are_converted_with_a_warning(directory: Path, model: PersimmonModel) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(halves, directory / "model.safetensors")
    with pytest.warns(UserWarning, match=r"float16 weights are loaded as bfloat16"):
        assert load_model(directory).lm_head.weight.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(directory, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    with pytest.raises(InputError, match=r"255\.9"):
        load_model(directory, dtype=torch.float16)


def test_mixed_types_need_a_decision(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, directory / "model.safetensors")
    assert open_directory(directory).dtype == "mixed"
    with pytest.raises(CheckpointError, match="differ in type"):
        load_model(directory)
    assert load_model(directory, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_training_a_loaded_model_changes_no_file(directory: Path) -> None:
    before = (directory / "model.safetensors").read_bytes()
    loaded = load_model(directory)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (directory / "model.safetensors").read_bytes() == before


def test_unaligned_files_load(directory: Path, model: PersimmonModel) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * ((len(header) + 1) % 2)  # an odd length puts every tensor at an odd address
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert same_tensors(load_model(directory), model)


_MEASURE = """
import resource, sys
import torch
from persimmon.checkpoints.hub import load_model
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def touch(model):
    return sum(float(p.detach().view(-1)[::512].float().sum()) for p in model.parameters())
touch(load_model(sys.argv[2]))
before = peak()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
loaded = peak()
touch(model)
print(loaded - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_memory_of_the_weights(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path, dtype: str
) -> None:
    """About 100 MB of bfloat16 weights: nothing resident until touched, no second copy, not even when converted."""
    config = made_config(tokenizer, hidden_size=768, intermediate_size=3_072, num_layers=7, num_heads=12)
    ones = {p.ours: torch.ones(p.shape, dtype=torch.bfloat16) for p in names.parameters(config)}
    save_model(ones, tokenizer, tmp_path / "big", config=config)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 95e6
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "big"), str(directory), dtype],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    loaded, touched = map(int, output.split())
    weights = size * (2 if dtype == "float32" else 1)
    largest_tensor = 2 * config.hidden_size * config.intermediate_size
    assert touched < weights + largest_tensor + 16e6
    if dtype == "bfloat16":
        assert loaded < 16e6
