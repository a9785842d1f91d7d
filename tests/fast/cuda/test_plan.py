"""What fits on which card: the bytes against the tensors themselves, and the choices for the 8B."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import interpreter_environment
from persimmon.checkpoints.directory import open_directory
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.errors import InputError, UnavailableError
from persimmon.fast.cpu.packed import open_packed
from persimmon.fast.cuda import weights
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.graphs import BUCKETS
from persimmon.fast.cuda.plan import (
    CARDS,
    DECODE_ROWS,
    GIB,
    choose,
    describe,
    device_kv_bytes_per_token,
    device_weight_bytes,
    plan,
    scratch_bytes,
)
from persimmon.fast.cuda.pool import Pool
from persimmon.infer.decoder import Chunk

PRUNED = preset("8b", vocab_size=192_144)
DEVICE = torch.device(interpreter_environment.DEVICE)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8", "q8", "q4", "p44"])
def test_planned_bytes_are_those_of_the_tensors(name: str, checkpoint: Path, packed: dict[str, Path]) -> None:
    if name in packed:
        opened = open_packed(packed[name])
        loaded = weights.from_packed(opened, opened.config, DEVICE)
    else:
        directory = open_directory(checkpoint)
        loaded = weights.from_directory(directory, directory.config, name, DEVICE)
    tensors = [loaded.embedding, *loaded.rotary, loaded.final_norm.weight, loaded.final_norm.bias]
    matrices = [loaded.head]
    for layer in loaded.layers:
        matrices += [layer.query_key_value, layer.dense, layer.up, layer.down]
        tensors += [layer.query_key_value_bias, layer.dense_bias, layer.up_bias, layer.down_bias, *layer.qk_norms]
        tensors += [layer.input_norm.weight, layer.input_norm.bias, layer.post_norm.weight, layer.post_norm.bias]
    found = sum(t.nbytes for t in tensors) + sum(m.num_bytes for m in matrices)
    listed = 2 * 64 * (name == "p44")  # the numbers of the outlier columns
    assert device_weight_bytes(loaded.config, name) == found - listed


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_planned_cache_is_the_pool(kv_dtype: str) -> None:
    config = preset("test")
    pool = Pool(config, 4, 16, kv_dtype, DEVICE)
    assert pool.num_bytes == (4 + 1) * 16 * device_kv_bytes_per_token(config, kv_dtype)


def test_the_8b_in_known_numbers() -> None:
    """persimmon's published size: 9.397 G parameters, 589,824 bytes of bfloat16 keys and values per token."""
    config = preset("8b")
    vectors = 36 * (16_384 + 256 + 12_288 + 4_096 + 16_384 + 4_096) + 8_192
    tables = 2 * 4 * 16_384 * 16
    assert device_weight_bytes(config, "bfloat16") == 2 * 9_397_175_296 + 2 * vectors + tables
    assert device_kv_bytes_per_token(config, "bfloat16") == 589_824
    assert device_kv_bytes_per_token(config, "int8") == 2 * 36 * (4096 + 64 * 4)
    layers = 9_397_175_296 - 2 * 262_144 * 4096 - vectors
    q4 = layers * 9 // 16 + 262_144 * 4096 * 17 // 16 + 2 * 262_144 * 4096
    assert device_weight_bytes(config, "q4") == q4 + 4 * vectors + tables
    assert scratch_bytes(config, "bfloat16", 16_384, 2_048) < GIB // 2


@pytest.mark.parametrize(
    ("card", "weights_format", "kv_dtype"),
    [
        ("80 GB", "bfloat16", "bfloat16"), ("40 GB", "bfloat16", "bfloat16"), ("24 GB", "q8", "bfloat16"),
        ("16 GB", "q8", "int8"), ("12 GB", "q4", "int8"),
    ],
)  # fmt: skip
def test_the_whole_context_on_every_card(card: str, weights_format: str, kv_dtype: str) -> None:
    """16,384 positions with the vocabulary pruned, and no more than the card has."""
    chosen = choose(PRUNED, CARDS[card])
    assert (chosen.weight_format, chosen.kv_dtype, chosen.context) == (weights_format, kv_dtype, 16_384)
    assert chosen.sequences >= 1 and chosen.total <= CARDS[card]
    parts = chosen.weights + chosen.keys_and_values + chosen.scratch + chosen.reserve
    assert parts == chosen.total
    assert chosen.reason


def test_the_promised_combinations_fit() -> None:
    """16k at int4 with int8 keys and values in 12 GB, int8 in 24 GB, bfloat16 in 40 GB."""
    for weights_format, kv_dtype, card in (
        ("q4", "int8", "12 GB"),
        ("q8", "int8", "24 GB"),
        ("bfloat16", "bfloat16", "40 GB"),
    ):
        assert plan(PRUNED, weights_format, kv_dtype, 16_384, CARDS[card]).sequences >= 1
    assert not plan(PRUNED, "q8", "int8", 16_384, 12 * GIB).sequences


def test_a_shorter_context_only_when_nothing_smaller_is_left() -> None:
    whole = preset("8b")
    cut = choose(whole, 12 * GIB)
    assert (cut.weight_format, cut.kv_dtype) == ("q4", "int8") and 8_192 < cut.context < 16_384
    assert cut.context % 512 == 0 and "16384 positions would take 12.5 GiB" in cut.reason
    longer = plan(whole, "q4", "int8", cut.context + 512, 12 * GIB)
    assert not longer.sequences
    assert choose(whole, 12 * GIB, context=4_096).context == 4_096


def test_what_cannot_fit_is_refused_with_what_is_missing() -> None:
    with pytest.raises(
        UnavailableError, match=r"does not fit: 23\.\d GiB for bfloat16 weights 17\.5 .* 15\.\d GiB are missing"
    ):
        choose(preset("8b"), 8 * GIB, formats=("bfloat16",))
    with pytest.raises(UnavailableError, match="use a shorter --context"):
        choose(PRUNED, 12 * GIB, formats=("q8",), context=16_384)
    with pytest.raises(UnavailableError, match="prune the vocabulary"):
        choose(preset("8b"), 12 * GIB, formats=("q4",), context=16_384)
    with pytest.raises(UnavailableError, match=r"missing"):
        choose(PRUNED, 24 * GIB, formats=("bfloat16",), kv_dtype="float32", context=16_384)
    with pytest.raises(InputError, match="context must be from 1 to 16384, got 20000"):
        choose(PRUNED, 80 * GIB, context=20_000)


def test_plans_say_what_they_are() -> None:
    text = describe(choose(PRUNED, 24 * GIB))
    assert text.startswith("19.4 GiB for q8 weights 9.4 GiB, bfloat16 keys and values of 16384 tokens 9.0 GiB")


def test_info_shows_the_plan_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "8b", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)["gpus"]
    assert [card["card"] for card in cards] == list(CARDS) and all(card["fits"] for card in cards)
    assert (cards[-1]["weight_format"], cards[-1]["kv_dtype"], cards[-1]["context"]) == ("q4", "int8", 13_312)
    assert cards[-1]["total"] <= cards[-1]["memory"] == CARDS["12 GB"] < 12 * GIB
    assert main(["info", "8b"]) == 0
    shown = capsys.readouterr().out
    assert "12.5 GiB" in shown and "24 GB: bfloat16 with bfloat16 keys and values would take 27.4 GiB" in shown


def test_scratch_counts_the_batches_that_are_captured() -> None:
    """Logits of the largest bucket twice, beside the larger of a prompt's attention and MLP; one GPU's, by hand."""
    assert DECODE_ROWS == BUCKETS[-1] == 64
    config = preset("8b")
    logits, rows, tokens = 4 * 262_144, 12 * 4096 + 4 * 16_384, 512
    unpacked = 2 * 4096 * 16_384
    assert (
        scratch_bytes(config, "q4", 16_384, tokens)
        == 2 * 64 * logits + 64 * (rows + 8 * 4 * 4096) + tokens * rows + unpacked
    )


def test_buckets_share_their_logits(checkpoint: Path) -> None:
    directory = open_directory(checkpoint)
    decoder = CudaDecoder(weights.from_directory(directory, directory.config, "float32", DEVICE), cache_tokens=192)
    for count in (1, 2):
        sequences = [decoder.new_sequence(16) for _ in range(count)]
        decoder.forward([Chunk(sequence, [1]) for sequence in sequences])
    buffers = decoder._runner()._buffers
    assert {size: len(b.logits) for size, b in buffers.items()} == {1: 1, 2: 2}
    assert len({b.logits.untyped_storage().data_ptr() for b in buffers.values()}) == 1
    decoder._warm_up()  # what comes before the GPU's free memory is asked for; sequences keep what they hold
    assert [sequence.length for sequence in sequences] == [1, 1]
