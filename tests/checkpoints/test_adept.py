"""Adept's release: tars made here in their layout, read exactly, checked, in bounded memory."""

from __future__ import annotations

import argparse
import gzip
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from made_checkpoints import made_config, made_model, made_tokenizer, release_state, same_tensors, write_release
from persimmon.checkpoints.adept import md5_of, open_release
from persimmon.checkpoints.convert import write_release as write_directory
from persimmon.checkpoints.hub import load_model
from persimmon.checkpoints.releases import RELEASES, by_md5, licence_of
from persimmon.errors import CheckpointError, NotFoundError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer


@pytest.fixture
def tar(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write_release(tmp_path / "release.tar", release_state(model), tokenizer.serialized)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_release_becomes_the_same_model(
    model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path, legacy: bool, protocol: int
) -> None:
    state = release_state(model)
    tar = write_release(tmp_path / "r.tar", state, tokenizer.serialized, legacy=legacy, protocol=protocol)
    checkpoint = open_release(tar)
    assert checkpoint.config == model.config
    assert list(checkpoint.tensors) == list(model.state_dict())
    assert checkpoint.tokenizer.serialized == tokenizer.serialized
    write_directory(checkpoint, tmp_path / "out", release=RELEASES[1], max_shard_bytes=9_000)
    assert same_tensors(load_model(tmp_path / "out"), model)
    assert Tokenizer.load(tmp_path / "out").encode("the human.") == tokenizer.encode("the human.")
    assert licence_of(tmp_path / "out") == "CC-BY-NC-4.0"


def test_other_shapes(tmp_path: Path) -> None:
    """Padded rows, a wide MLP, another rotary share, no QK LayerNorm."""
    tokenizer = made_tokenizer(dummy_prefix=True)
    for changes in (
        {"vocab_size": 384, "intermediate_size": 24},
        {"hidden_size": 24, "num_heads": 1, "partial_rotary_factor": 1 / 3},
        {"qk_layernorm": False},
        {"max_positions": 2_048, "rotary_base": 10_000.0, "layer_norm_eps": 1e-6},
    ):
        model = made_model(made_config(tokenizer, **changes))
        args = {"qk_layernorm": "none"} if "qk_layernorm" in changes else {}
        tar = write_release(tmp_path / "r.tar", release_state(model, **args), tokenizer.serialized)
        checkpoint = open_release(tar)
        found, expected = checkpoint.config, model.config
        assert found.replace(partial_rotary_factor=0.5) == expected.replace(partial_rotary_factor=0.5)
        assert found.rotary_dim == expected.rotary_dim


def test_the_unpacked_tar_and_its_pt(tar: Path, model: PersimmonModel, tmp_path: Path) -> None:
    with tarfile.open(tar) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    folder = tmp_path / "unpacked" / "release"
    weights = folder / "iter_0001251" / "mp_rank_00" / "model_optim_rng.pt"
    for source in (folder, weights):
        checkpoint = open_release(source)
        write_directory(checkpoint, tmp_path / "out")
        assert same_tensors(load_model(tmp_path / "out"), model)
        shutil.rmtree(tmp_path / "out")
    moved = shutil.move(weights, tmp_path / "alone.pt")
    with pytest.raises(NotFoundError, match=r"adept_vocab\.model.*--tokenizer"):
        open_release(Path(moved))
    assert open_release(Path(moved), folder / "adept_vocab.model").config == model.config


def test_the_tracker_chooses_the_iteration(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    older = made_model(model.config, seed=5, dtype=torch.bfloat16)
    for number, each in ((7, older), (1251, model)):
        stream = io.BytesIO()
        torch.save(release_state(each), stream)
        file = tmp_path / "r" / f"iter_{number:07d}" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(stream.getvalue())
    (tmp_path / "r" / "adept_vocab.model").write_bytes(tokenizer.serialized)
    (tmp_path / "r" / "latest_checkpointed_iteration.txt").write_text("1251\n")
    write_directory(open_release(tmp_path / "r"), tmp_path / "out")
    assert same_tensors(load_model(tmp_path / "out"), model)
    shutil.copytree(tmp_path / "r" / "iter_0001251" / "mp_rank_00", tmp_path / "r" / "iter_0001251" / "mp_rank_01")
    with pytest.raises(CheckpointError, match="2 weight files"):
        open_release(tmp_path / "r")


# -- evidence and arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (torch.float32, "stored as float32 and exact to .*: training kept it in float32"),
        (torch.bfloat16, "stored as bfloat16 and exact to 0.00.*: training kept it in bfloat16"),
    ],
)
def test_the_stored_frequencies_are_reported(tokenizer: Tokenizer, tmp_path: Path, stored: Any, words: str) -> None:
    model = made_model(made_config(tokenizer, hidden_size=128))
    tar = write_release(tmp_path / "r.tar", release_state(model, stored), tokenizer.serialized)
    notes = "\n".join(open_release(tar).notes)
    assert re.search(words, notes)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_layers": 3}, r"num_layers is 3, the tensors show 2"),
        ({"hidden_size": 32}, r"hidden_size is 32, the tensors show 16"),
        ({"num_attention_heads": 4}, r"num_attention_heads is 4, the tensors show 2"),
        ({"ffn_hidden_size": 64}, r"ffn_hidden_size is 64, the tensors show 40"),
        ({"padded_vocab_size": 320}, r"padded_vocab_size is 320, the tensors show 294"),
        ({"sq_relu": False}, r"sq_relu is False, a Persimmon has True"),
        ({"sq_relu": None}, r"sq_relu is None"),
        ({"bias_gelu_fusion": True}, r"bias_gelu_fusion is True"),
        ({"pos_emb": "alibi"}, r"pos_emb is 'alibi', a Persimmon has 'rotary'"),
        ({"untie_embeddings": False}, r"untie_embeddings"),
        ({"qk_layernorm": "weights_per_attention_head_and_layer"}, r"qk_layernorm"),
        ({"apply_residual_connection_post_layernorm": True}, r"residual"),
        ({"tensor_model_parallel_size": 2}, r"tensor_model_parallel_size is 2"),
        ({"rotary_pct": 1.0}, r"rotary_pct is 1\.0.*shows 0\.5"),
        ({"rotary_emb_base": 30_000}, r"deviates by 0\.\d+ from base 30000"),
        ({"rotary_emb_base": 10_000}, r"rotary_base 10000 is too small"),
        ({"max_position_embeddings": 0}, r"max_positions must be at least 1"),
        ({"layernorm_epsilon": "small"}, r"layer_norm_eps must be a number"),
        ({"layernorm_epsilon": np.float64(1e-5)}, r"layer_norm_eps must be a number, got '<Call>'"),
        ({"num_layers": [[[[1]]]]}, r"num_layers is '<list>'"),
        ({"rotary_pct": "half"}, r"rotary_pct is 'half'"),
        ({"rotary_pct": float("nan")}, r"rotary_pct is nan"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    tar = write_release(tmp_path / "r.tar", release_state(model, **args), tokenizer.serialized)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_release(tar)
    assert str(tar) in str(caught.value)


def test_what_the_arguments_lack_is_said(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = release_state(model)
    state["args"] = argparse.Namespace(hidden_dropout=0.6)
    checkpoint = open_release(write_release(tmp_path / "r.tar", state, tokenizer.serialized))
    notes = "\n".join(checkpoint.notes)
    assert checkpoint.config == model.config.replace(hidden_dropout=0.6)
    for words in ("max_position_embeddings", "rotary_emb_base", "hidden_dropout 0.6"):
        assert words in notes
    assert "rotary_pct" not in notes  # the stored frequencies show it
    for layer in range(2):
        del state["model"]["language_model"]["encoder"][f"layers.{layer}.self_attention.rotary_emb.inv_freq"]
    checkpoint = open_release(write_release(tmp_path / "r.tar", state, tokenizer.serialized))
    assert any("rotary_pct is not among the arguments: 0.5 assumed" in note for note in checkpoint.notes)
    del state["args"]
    assert open_release(write_release(tmp_path / "r.tar", state, tokenizer.serialized)).config == model.config


# -- damage --------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(model: PersimmonModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def opened(change: Any) -> None:
        state = release_state(model)
        change(state["model"])
        open_release(write_release(tmp_path / "r.tar", state, tokenizer.serialized))

    encoder = "language_model.encoder"
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.dense_4h_to_h\.bias is missing"):
        opened(lambda m: m["language_model"]["encoder"].pop("layers.1.mlp.dense_4h_to_h.bias"))
    with pytest.raises(CheckpointError, match=rf"{encoder}\.extra .* is no part of the model"):
        opened(lambda m: m["language_model"]["encoder"].update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"word_embeddings_for_head\.weight should be \[294, 16\]"):
        opened(lambda m: m["word_embeddings_for_head"].update(weight=torch.zeros(4, 16)))
    with pytest.raises(CheckpointError, match=r"not a Persimmon: .*word_embeddings\.weight is missing"):
        opened(lambda m: m["language_model"].pop("embedding"))


@settings(max_examples=60)
@given(st.data())
def test_truncated_tars_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp()
    whole = base / "whole.tar"
    if not whole.exists():
        tokenizer = made_tokenizer()
        write_release(whole, release_state(made_model(made_config(tokenizer))), tokenizer.serialized)
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        last = max(archive.getmembers(), key=lambda member: member.offset_data)
    cut = base / "cut.tar"
    cut.write_bytes(content[: data.draw(st.integers(0, last.offset_data + last.size - 1))])
    with pytest.raises((CheckpointError, NotFoundError)) as caught:
        write_directory(open_release(cut), base / "out")
    assert "cut.tar" in str(caught.value)
    assert not (base / "out").exists()


def test_damaged_numbers_are_not_written(tar: Path, model: PersimmonModel, tmp_path: Path) -> None:
    data = bytearray(tar.read_bytes())
    tensor = open_release(tar).tensors["layers.0.mlp.dense_h_to_4h.weight"]
    data[tensor.offset + 17] ^= 4
    tar.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h\.weight is damaged: CRC-32"):
        write_directory(open_release(tar), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_named(tmp_path: Path, tar: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        open_release(tmp_path / "nowhere.tar")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(CheckpointError, match="decompress it first"):
        open_release(tmp_path / "x.tar.gz")
    (tmp_path / "text").write_text("no release")
    with pytest.raises(CheckpointError, match="not a torch file"):
        open_release(tmp_path / "text")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"empty\.tar"):
        open_release(tmp_path / "empty.tar")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="no 'model'"):
        open_release(tmp_path / "state.pt")
    no_vocabulary = write_release(tmp_path / "r.tar", {"model": {}}, None)
    with pytest.raises(NotFoundError, match="--tokenizer"):
        open_release(no_vocabulary)


def test_md5_is_streamed_and_known(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"persimmon" * 2_000_000)
    seen: list[tuple[int, int]] = []
    result = subprocess.run(["md5sum", str(tmp_path / "x")], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        assert md5_of(tmp_path / "x", lambda *args: seen.append(args)) == result.stdout.split()[0]
        assert len(seen) == 3 and seen[-1] == (18_000_000, 18_000_000)
    assert by_md5("663aeace07269c44e90f4e8bcd07f32a") is RELEASES[1]
    assert by_md5("0" * 32) is None


_MEASURE = """
import resource, sys
from pathlib import Path
from persimmon.checkpoints.adept import open_release
from persimmon.checkpoints.convert import write_release
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write_release(open_release(Path(sys.argv[2])), Path(sys.argv[3]) / "warm")
before = peak()
write_release(open_release(Path(sys.argv[1])), Path(sys.argv[3]) / "out", max_shard_bytes=50_000_000)
assert "torch" not in sys.modules
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
@pytest.mark.parametrize("legacy", [False, True])
def test_importing_takes_little_memory(tar: Path, tokenizer: Tokenizer, tmp_path: Path, legacy: bool) -> None:
    """A release of 130 MB whose largest tensor has 38 MB needs a few chunks, not a tensor, and no torch."""
    config = made_config(tokenizer, vocab_size=50_000, hidden_size=384, intermediate_size=1_536, num_layers=10)
    state = release_state(made_model(config, dtype=torch.bfloat16))
    big = write_release(tmp_path / "big.tar", state, tokenizer.serialized, legacy=legacy)
    assert big.stat().st_size > 110e6
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(big), str(tar), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    # Two chunks of 8 MiB are in flight; the old layout is parsed from a buffer of up to 64 MiB.
    assert int(output) < (96e6 if legacy else 24e6)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
