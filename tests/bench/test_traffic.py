"""Bytes per token against the packed tensors themselves, and against counts written down by hand."""

from __future__ import annotations

import pytest

from persimmon.bench.traffic import (
    MlpUse,
    all_neurons,
    counted_neurons,
    in_batch,
    mlp_bytes,
    prefill_flops,
    prompt_bytes,
    token_traffic,
)
from persimmon.config import preset
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.memory import kv_bytes_per_token
from persimmon.fast.cpu.packed import planned_bytes

FULL = preset("8b")


def counts_of(config: object, candidates: int, active: int, tokens: int = 10) -> list[dict[str, float]]:
    groups = min(-(-config.intermediate_size // 32), active)
    layer = {"tokens": tokens, "candidates": candidates * tokens, "active": active * tokens, "groups": groups * tokens}
    return [layer] * config.num_layers


@pytest.mark.parametrize("form", FORMATS)
def test_a_dense_token_reads_every_tensor_but_the_embedding(form: str) -> None:
    """The sum over the file's tensors is the oracle; outlier columns (64 bytes a layer) are indices, not weights."""
    embedding = "F32" if form == "float32" else "BF16"
    item = 4 if form == "float32" else 2
    stored = planned_bytes(FULL, FORMATS[form], embedding)
    stored -= FULL.vocab_size * FULL.hidden_size * item  # the embedding ...
    stored += FULL.hidden_size * item  # ... of which one row is read
    stored -= FULL.num_layers * 16 * 4 if form == "p44" else 0
    neurons = FULL.intermediate_size
    traffic = token_traffic(FULL, form, "int8", attended=0, counts=counts_of(FULL, neurons, neurons))
    assert traffic.dense == traffic.read == stored


def test_p44_reads_hot_rows_always_and_cold_ones_by_need() -> None:
    """Row of 4096 inputs: top 16 * 72 + 48, padded to 64; rest 16 * 192, down 16 * 272."""
    use = MlpUse(candidates=2000, active=1500, groups=400)
    assert mlp_bytes(FULL, FORMATS["p44"], use) == 16384 * 1216 + 2000 * 3072 + 1500 * 4352
    assert mlp_bytes(FULL, FORMATS["q8"], use) == 16384 * 4352 + 1500 * 4352
    assert mlp_bytes(FULL, FORMATS["q4"], use) == 16384 * 2304 + 1500 * 2048 + 400 * 8192
    assert mlp_bytes(FULL, FORMATS["bfloat16"], MlpUse(16384, 1500)) == (16384 + 1500) * 8192


def test_a_sketch_is_read_and_the_rows_that_it_leaves() -> None:
    """Row of 256 inputs: 512 bytes of bfloat16, a sketch of 256 codes (the head: of five bits) and five numbers."""
    mini = preset("mini")
    assert mlp_bytes(mini, FORMATS["bfloat16"], MlpUse(60, 50)) == 1024 * 276 + (60 + 50) * 512
    assert mlp_bytes(mini, FORMATS["float32"], MlpUse(60, 50)) == 1024 * 276 + (60 + 50) * 1024
    counts = counts_of(mini, 1024, 50)
    whole, few = (token_traffic(mini, "bfloat16", "float32", attended=9, counts=counts, head_rows=r) for r in (8192, 3))
    assert whole.dense == few.dense and whole.read - few.read == 8192 * 512 - 8192 * 180 - 3 * 512


def test_skipped_neurons_and_head_rows_are_taken_off() -> None:
    counts = counts_of(FULL, 2000, 1500)
    traffic = token_traffic(FULL, "p44", "int8", attended=100.5, counts=counts, head_rows=12)
    skipped = 36 * ((16384 - 2000) * 3072 + (16384 - 1500) * 4352) + (262144 - 12) * 3072
    skipped -= 12 * 1216  # rows of the head that are refined: their top rows are read a second time
    assert traffic.dense - traffic.read == skipped
    shallow = token_traffic(FULL, "p44", "int8", attended=0, counts=counts, head_rows=12)
    assert traffic.read - shallow.read == 100.5 * kv_bytes_per_token(FULL, "int8") == 100.5 * 36 * 2 * 64 * 68


def test_a_batch_shares_weights_and_adds_up_neurons_at_most_to_all() -> None:
    uses = in_batch([MlpUse(2000, 1500, 40)], 8, FULL)
    assert uses == [MlpUse(16000, 12000, 320)] and in_batch(uses, 8, FULL) == [MlpUse(16384, 16384, 512)]
    alone = token_traffic(FULL, "q4", "int8", attended=0, counts=counts_of(FULL, 16384, 16384))
    eight = token_traffic(FULL, "q4", "int8", attended=0, batch=8, counts=counts_of(FULL, 16384, 16384))
    assert eight.read == alone.read / 8


def test_a_prompt_reads_the_blocks_once_a_step_and_the_head_once() -> None:
    token = token_traffic(FULL, "q4", "int8", attended=0, counts=counts_of(FULL, 0, 0)).dense
    head = 262144 * (1216 + 16 * 192) + 2 * 4096 * 4 + 4096 * 2
    cache = 512 * 513 / 2 / 32 * kv_bytes_per_token(FULL, "int8")
    assert prompt_bytes(FULL, "q4", "int8", 1, 256) == pytest.approx(token, rel=1e-4)
    assert prompt_bytes(FULL, "q4", "int8", 512, 256) == 2 * (token - head) + head + cache
    assert prompt_bytes(FULL, "q4", "int8", 513, 256) > 3 * (token - head) + head + cache


def test_an_engine_without_counts_reads_everything() -> None:
    p44 = token_traffic(FULL, "p44", "int8", attended=10)
    assert p44.read == p44.dense
    traffic = token_traffic(FULL, "bfloat16", "bfloat16", attended=10)
    assert traffic.read == traffic.dense
    assert 16.6e9 < traffic.read < 16.8e9  # 8.323 G weights of two bytes


def test_counts_are_means_and_before_the_first_token_all_neurons_count() -> None:
    config = preset("test")
    layer = {"tokens": 4, "candidates": 40, "active": 20}
    assert counted_neurons([layer], config) == [MlpUse(10, 5)]
    assert counted_neurons([{**layer, "groups": 8}], config) == [MlpUse(10, 5, 2)]
    assert counted_neurons([{**layer, "tokens": 0}], config) == all_neurons(config)[:1]


def test_prefill_counts_the_head_once_and_causal_attention() -> None:
    config = preset("test")
    one, two = prefill_flops(config, 1), prefill_flops(config, 2)
    attention = 2 * config.hidden_size * config.num_layers
    blocks = (two - one) - 3 * attention  # 2 * (2^2 - 1^2) of the products
    assert one - attention - blocks == 2 * config.vocab_size * config.hidden_size
