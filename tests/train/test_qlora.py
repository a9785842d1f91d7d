"""Training on packed weights: what the bytes stand for, gradients, memory, and a held-out loss that falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import packed_layouts
from live_bytes import LiveBytes
from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, count_adapter
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.packed import planned_bytes
from persimmon.fast.cpu.quantize import quantize
from persimmon.infer.decoder import Chunk
from persimmon.train import qlora
from persimmon.train.objective import cross_entropy
from tiny_directory import write_tiny_directory
from tiny_model import tiny_ids

# Wider than a superblock, and no multiple of one, so that padding counts.
SHAPE = {"hidden_size": 288, "intermediate_size": 640, "num_heads": 4, "num_layers": 2}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qlora")
    base = write_tiny_directory(root / "base", dtype=torch.float32, **SHAPE)
    for name in ("q8", "q4", "p44"):
        quantize(base, root / name, name)
    return {name: root / name for name in ("base", "q8", "q4", "p44")}


def floats(matrix: qlora.PackedLinear) -> torch.Tensor:
    whole = torch.cat([part for _, part in matrix.slices(torch.float32)])
    return whole.t() if matrix.by_inputs else whole


def test_unpacking_is_what_the_layouts_say() -> None:
    weights = np.random.default_rng(0).normal(size=(9, 300)).astype(np.float32)
    q8, q4 = (packed_layouts.pack(kind, weights) for kind in ("q8", "q4"))
    neurons, (top, rest) = packed_layouts.pack_neurons(weights), packed_layouts.pack_planes(weights)
    records = packed_layouts.pack_records(weights.T)
    np.testing.assert_array_equal(
        qlora.unpack_records(torch.from_numpy(records)).numpy(), packed_layouts.unpack_records(records)
    )
    for ours, theirs in (
        (qlora.unpack_q8(torch.from_numpy(q8)), packed_layouts.unpack_q8(q8)),
        (qlora.unpack_q4(torch.from_numpy(q4)), packed_layouts.unpack_q4(q4)),
        (qlora.unpack_int8(torch.from_numpy(neurons)), packed_layouts.unpack_neurons(neurons)),
        (
            qlora.unpack_planes(torch.from_numpy(top), torch.from_numpy(rest)),
            packed_layouts.unpack_planes(top, rest),
        ),
    ):
        assert ours.shape == (9, 512)
        np.testing.assert_array_equal(ours.numpy(), theirs)
        assert (ours[:, 300:] == 0).all()


@pytest.mark.parametrize("form", ["q8", "q4"])
def test_a_packed_model_is_the_model_of_its_floats(places: dict[str, Path], form: str) -> None:
    """Every packed matrix unpacked into a plain model gives the same logits, and the base's are near."""
    packed = qlora.load_packed_model(places[form], dtype=torch.float32)
    plain = hub.load_model(places["base"], dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, qlora.PackedLinear):
            original = plain.get_submodule(name)
            assert isinstance(original, nn.Linear)
            error = (floats(module) - original.weight).norm() / original.weight.norm()
            # Normal weights in groups of 32: a step is about 2.1 sigma / 127, or / 7, and errors are even in it.
            assert error < (0.12 if module.kind in ("q4", "records") else 0.007), name
            original.weight.data = floats(module).contiguous()
    ids = tiny_ids(plain.config, 2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids), plain(ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["q8", "q4"])
def test_the_engine_reads_the_same_weights(places: dict[str, Path], form: str) -> None:
    """The CPU engine rounds activations to int8 as well, so its logits are near, not equal."""
    model = qlora.load_packed_model(places[form], dtype=torch.float32)
    decoder = load_decoder(places[form], kv_dtype="float32", sparsity_margin=float("inf"))
    ids = tiny_ids(model.config, 1, 24)
    (logits,) = decoder.forward([Chunk(decoder.new_sequence(24), ids[0].tolist(), "all")])
    assert logits is not None
    with torch.inference_mode():
        ours = model(ids)[0]
    assert torch.corrcoef(torch.stack([torch.from_numpy(logits).flatten(), ours.flatten()]))[0, 1] > 0.998


@pytest.mark.parametrize("form", ["q8", "q4"])
@pytest.mark.parametrize("by_inputs", [False, True])
def test_gradients_of_packed_products(
    places: dict[str, Path], form: str, by_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora, "SLICE_BYTES", 4 * 288 * 100)  # several slices, the last one smaller
    model = qlora.load_packed_model(places[form], dtype=torch.float32)
    name = "layers.1.mlp.dense_4h_to_h" if by_inputs else "layers.1.mlp.dense_h_to_4h"
    matrix = model.get_submodule(name)
    assert isinstance(matrix, qlora.PackedLinear) and matrix.by_inputs == by_inputs
    x = torch.randn(2, 5, matrix.in_features, requires_grad=True)
    y = torch.randn(2, 5, matrix.out_features)
    (matrix(x) * y).sum().backward()
    grad = x.grad
    weight, bias = floats(matrix), matrix.bias
    assert isinstance(bias, torch.Tensor) and grad is not None
    torch.testing.assert_close(matrix(x), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, y @ weight, rtol=1e-5, atol=1e-4)


def test_adapter_gradients_are_those_on_the_unpacked_base(places: dict[str, Path]) -> None:
    settings = LoraSettings(rank=4)
    packed = qlora.load_packed_model(places["q4"], dtype=torch.float32)
    plain = hub.load_model(places["base"], dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, qlora.PackedLinear):
            plain.get_submodule(name).weight.data = floats(module).contiguous()
    ids = tiny_ids(plain.config, 1, 16)
    grads = []
    for model in (packed, plain):
        lora.attach(model, settings)
        hidden = model.features(ids[:, :-1]).flatten(0, 1)
        loss = cross_entropy(model, hidden, ids[0, 1:], 1 / 15)
        loss.backward()
        grads.append([(n, m.lora_A.grad, m.lora_B.grad) for n, m in lora.adapted_modules(model).items()])
    for (name, *first), (_, *second) in zip(*grads, strict=True):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_formats_without_a_reader_are_refused(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is p44; adapters train on q8 or q4"):
        qlora.load_packed_model(places["p44"], dtype=torch.float32)


@pytest.mark.parametrize("form", ["q8", "q4"])
def test_the_frozen_base_costs_its_packed_bytes(places: dict[str, Path], form: str) -> None:
    model = qlora.load_packed_model(places[form], dtype=torch.float32)
    expected = planned_bytes(model.config, FORMATS[form], "F32")
    assert qlora.packed_bytes(model) == expected
    settings = LoraSettings(rank=4)
    lora.attach(model, settings)
    assert qlora.packed_bytes(model) == expected
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count_adapter(model.config, settings)


def test_live_bytes_counts_what_exists() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        first = before * 2
        view = first[:10] + 0
        assert live.now == 4040
        del first
        assert live.now == 40
        second = before.double()
    assert live.peak == 8040 and len(view) + len(second) == 1010


def test_a_training_step_never_holds_the_base_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes of every tensor made during forward and backward: activations and one slice, no float copy."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "num_layers": 8}
    base = write_tiny_directory(tmp_path / "base", dtype=torch.bfloat16, **shape)
    quantize(base, tmp_path / "q4", "q4")
    monkeypatch.setattr(qlora, "SLICE_BYTES", 64 << 10)
    ids = tiny_ids(hub.load_model(base).config, 1, 17)
    peaks = {}
    for name in ("packed", "float"):
        if name == "packed":
            model = qlora.load_packed_model(tmp_path / "q4", dtype=torch.float32)
        else:
            model = hub.load_model(base, dtype=torch.float32)
        lora.attach(model, LoraSettings(rank=2))
        with LiveBytes() as live:
            hidden = model.features(ids[:, :-1]).flatten(0, 1)
            cross_entropy(model, hidden, ids[0, 1:], 1 / 16).backward()
        peaks[name] = live.peak
    floats_of_base = 4 * sum(p.numel() for p in hub.load_model(base).parameters())
    # Beside activations and gradients, which both have, the packed run makes a slice in a few intermediate forms.
    assert peaks["packed"] < peaks["float"] + 12 * (64 << 10)
    assert peaks["packed"] < floats_of_base / 8
    total = peaks["packed"] + planned_bytes(model.config, FORMATS["q4"], "BF16")
    assert total < floats_of_base / 3


def test_bfloat16_autocast_runs(places: dict[str, Path]) -> None:
    model = qlora.load_packed_model(places["q8"], dtype=torch.bfloat16)
    lora.attach(model, LoraSettings(rank=2))
    ids = tiny_ids(model.config, 1, 9)
    exact = qlora.load_packed_model(places["q8"], dtype=torch.float32)(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.features(ids)
        loss = cross_entropy(model, hidden.flatten(0, 1), ids[0], 1.0)
        logits = model(ids)
    loss.backward()
    assert all(m.lora_B.grad is not None for m in lora.adapted_modules(model).values())
    assert torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1] > 0.999
