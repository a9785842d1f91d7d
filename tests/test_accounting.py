"""The arithmetic against the published and derived numbers of the 8B, and against real models."""

from __future__ import annotations

import pytest

from persimmon import accounting
from persimmon.config import ModelConfig, preset
from persimmon.errors import InputError

EIGHT_B = preset("8b")
GB = 1e9


def test_parameters_of_the_8b() -> None:
    count = accounting.count_parameters(EIGHT_B)
    assert count.total == 9_397_175_296
    assert count.embedding == count.head == 1_073_741_824
    assert count.total - count.embedding - count.head - 8_192 == 7_249_683_456 == 36 * 201_380_096
    assert count.read_per_token == 8_323_433_472
    pruned = EIGHT_B.replace(vocab_size=192_144)
    assert accounting.count_parameters(pruned).total == 8_823_735_296


@pytest.mark.parametrize("config", [preset("test"), preset("mini"), preset("test", qk_layernorm=False)])
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    torch = pytest.importorskip("torch")
    from persimmon.model import PersimmonModel

    with torch.device("meta"):
        parameters = dict(PersimmonModel(config).named_parameters())
    count = accounting.count_parameters(config)
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.vectors == sum(p.numel() for p in parameters.values() if p.dim() == 1)
    assert count.mlp == sum(p.numel() for name, p in parameters.items() if ".mlp." in name)
    assert count.norms == sum(p.numel() for name, p in parameters.items() if "layernorm" in name)


def test_weight_bytes_of_the_8b() -> None:
    assert accounting.weight_bytes(EIGHT_B, "bfloat16") == 2 * 9_397_175_296
    assert accounting.weight_bytes(EIGHT_B, "float32") / GB == pytest.approx(37.59, abs=0.005)
    pruned = EIGHT_B.replace(vocab_size=192_144)
    assert accounting.weight_bytes(pruned, "bfloat16") / GB == pytest.approx(17.65, abs=0.005)


@pytest.mark.parametrize(("weight_format", "gigabytes"), [("bfloat16", 16.65), ("q8", 8.84), ("q4", 4.69)])
def test_bytes_per_token_of_the_8b(weight_format: str, gigabytes: float) -> None:
    found = accounting.weight_bytes_per_token(EIGHT_B, weight_format) / GB
    assert found == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(("zeros", "down", "both"), [(0.80, 1.30, 1.87), (0.90, 1.35, 2.09), (0.95, 1.38, 2.23)])
def test_sparsity_ceilings_of_the_8b(zeros: float, down: float, both: float) -> None:
    dense = accounting.weight_bytes_per_token(EIGHT_B, "bfloat16")
    for skip, ceiling in (("down", down), ("both", both)):
        read = accounting.weight_bytes_per_token(EIGHT_B, "bfloat16", active=1 - zeros, skip=skip)
        assert dense / read == pytest.approx(ceiling, abs=0.005)


def test_q4_reads_the_scales_of_groups_with_an_active_neuron() -> None:
    """A tenth of the down rows' codes, and all but 0.9^32 of the scales: 7.4 MB of 37.7 a layer."""
    read = accounting.weight_bytes_per_token(EIGHT_B, "q4", active=0.1, skip="down")
    layer = 0.1 * 16384 * 2048 + (1 - 0.9**32) * 512 * 8192
    dense = accounting.weight_bytes_per_token(EIGHT_B, "q4")
    assert dense - read == pytest.approx(36 * (4096 * 16384 * 4.5 / 8 - layer), rel=1e-9)


def test_skipping_nothing_reads_everything() -> None:
    for skip in ("none", "down", "both"):
        full = accounting.weight_bytes_per_token(EIGHT_B, "q4", active=1.0, skip=skip)
        assert full == accounting.weight_bytes_per_token(EIGHT_B, "q4")


def test_cache_bytes_of_the_8b() -> None:
    assert accounting.kv_bytes_per_token(EIGHT_B, "bfloat16") == 589_824
    assert accounting.kv_bytes_per_token(EIGHT_B, "float32") == 2 * 589_824
    scales = 2 * 36 * 64 * 4
    assert accounting.kv_bytes_per_token(EIGHT_B, "int8") == 589_824 // 2 + scales
    assert accounting.plan_memory(EIGHT_B, 16_384, "bfloat16", "bfloat16").kv_bytes == 9 * 2**30


def test_flops_of_the_8b() -> None:
    assert accounting.training_flops_per_token(EIGHT_B, 16_384) / 1e9 == pytest.approx(64.4, abs=0.05)
    parameters_only = accounting.training_flops_per_token(EIGHT_B, 0)
    assert parameters_only / 1e9 == pytest.approx(49.9, abs=0.05)
    assert accounting.decoding_flops_per_token(EIGHT_B, 0) * 3 == parameters_only
    # 737 G tokens of training take about 4.7e22 operations.
    assert 737e9 * accounting.training_flops_per_token(EIGHT_B, 16_384) == pytest.approx(4.7e22, rel=0.02)


def test_logits_of_the_8b() -> None:
    assert accounting.logit_bytes_per_position(EIGHT_B) == 2**20


def test_memory_plan_adds_up() -> None:
    plan = accounting.plan_memory(EIGHT_B, 2_048, "q4", "int8")
    assert plan.weight_bytes == accounting.weight_bytes(EIGHT_B, "q4")
    assert plan.total_bytes == plan.weight_bytes + 2_048 * accounting.kv_bytes_per_token(EIGHT_B, "int8")


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="float32, bfloat16, q8, q4"):
        accounting.weight_bytes(EIGHT_B, "q5")
    with pytest.raises(InputError, match="int8"):
        accounting.kv_bytes_per_token(EIGHT_B, "int4")
    with pytest.raises(InputError, match="skip"):
        accounting.weight_bytes_per_token(EIGHT_B, "q4", skip="up")
    with pytest.raises(InputError, match=r"1\.5"):
        accounting.weight_bytes_per_token(EIGHT_B, "q4", active=1.5)
    with pytest.raises(InputError, match="16384"):
        accounting.plan_memory(EIGHT_B, 16_385, "q4", "int8")
