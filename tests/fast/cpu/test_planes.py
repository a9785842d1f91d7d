"""Packed models whose LayerNorms have large biases: planes are rounded around them, and the engine reads them so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from made_models import sparse_model
from packed_layouts import Planes, pack_neurons, read_planes, round_planes, same_planes, with_outliers
from persimmon.checkpoints import hub
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.fast.cpu import _native
from persimmon.fast.cpu.decoder import DEFAULT_MARGIN
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.packed import open_packed
from persimmon.fast.cpu.quantize import quantize
from persimmon.infer.decoder import Chunk
from persimmon.model import PersimmonModel

CONFIG = preset("test", hidden_size=256, intermediate_size=1_200, num_heads=4, vocab_size=4_500)
REST = 192  # bytes of a rest row of 256 inputs
IDS = np.random.default_rng(7).integers(0, CONFIG.vocab_size, 24).tolist()


@pytest.fixture(scope="module")
def model() -> PersimmonModel:
    """Inputs of MLPs and head far from zero, of which the biases are the larger part."""
    made = sparse_model(CONFIG).float()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if name.endswith(("post_attention_layernorm.bias", "final_layernorm.bias")):
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def packed(model: PersimmonModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planes")
    hub.save_model(model, None, place / "source")
    quantize(place / "source", place / "p44", "p44")
    return place / "p44"


@torch.inference_mode()
def normed(model: PersimmonModel, name: str) -> np.ndarray:
    """What a LayerNorm of the reference gives for IDS, [T, H]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model(torch.tensor([IDS]))
    handle.remove()
    return seen[0].numpy()


def deviations(planes: Planes, x: np.ndarray, center: np.ndarray) -> np.ndarray:
    return planes.error * np.linalg.norm(x - center, axis=1)[:, None]


def test_planes_are_rounded_around_the_bias_of_the_norm_before(model: PersimmonModel, packed: Path) -> None:
    """Up projections and head, column by column; outlier columns have no part in it and keep their weights."""
    arrays = open_packed(packed).map()
    layer = model.layers[1]
    columns = np.array(arrays["layers.1.mlp.outlier_columns"])
    up = layer.mlp.dense_h_to_4h.weight.detach().numpy().copy()
    center = layer.post_attention_layernorm.bias.detach().numpy().copy()
    exact = up[:, columns].astype(np.float16)
    energy = layer.post_attention_layernorm.weight.detach().numpy() ** 2
    up[:, columns], center[columns], energy[columns] = 0.0, 0.0, 0.0
    hot, cold = arrays["layers.1.mlp.hot"], arrays["layers.1.mlp.cold"]
    same_planes(read_planes(hot, cold[:, :REST]), round_planes(up, center, energy))
    assert np.array_equal(with_outliers(hot, model.config.hidden_size, exact), hot)
    down = layer.mlp.dense_4h_to_h.weight.detach().numpy().T
    assert np.array_equal(cold[:, REST:], pack_neurons(np.ascontiguousarray(down)))
    norm = model.final_layernorm
    head = model.lm_head.weight.detach().numpy(), norm.bias.detach().numpy(), norm.weight.detach().numpy() ** 2
    same_planes(read_planes(arrays["lm_head.top"], arrays["lm_head.rest"]), round_planes(*head))


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 2.0])
def test_the_engine_measures_distances_from_the_norms_bias(model: PersimmonModel, packed: Path, margin: float) -> None:
    """As many neurons are kept as by the definition, on the reference's inputs; from zero it would be far more."""
    decoder = load_decoder(packed, sparsity_margin=margin, kv_dtype="float32")
    sequence = decoder.new_sequence(len(IDS))
    for token in IDS:
        decoder.forward([Chunk(sequence, [token])])
    arrays = open_packed(packed).map()
    for index, counted in enumerate(decoder.layer_counts()):
        layer, prefix = model.layers[index], f"layers.{index}."
        x = normed(model, prefix + "post_attention_layernorm")
        hot, columns = arrays[prefix + "mlp.hot"], arrays[prefix + "mlp.outlier_columns"]
        planes = read_planes(np.array(hot), np.array(arrays[prefix + "mlp.cold"][:, :REST]))
        rest, center = x.copy(), layer.post_attention_layernorm.bias.detach().numpy().copy()
        rest[:, columns], center[columns] = 0.0, 0.0
        estimates = _native.round_trip(rest) @ planes.coarse.T + planes.shift
        estimates += layer.mlp.dense_h_to_4h.bias.detach().numpy()
        estimates += x[:, columns] @ layer.mlp.dense_h_to_4h.weight.detach().numpy()[:, columns].T
        kept, from_zero = (
            np.count_nonzero(estimates > -margin * deviations(planes, rest, c)) for c in (center, np.zeros_like(center))
        )
        assert counted["candidates"] == pytest.approx(kept, rel=5e-3)  # attention is int4 and its sums are near only
        assert margin < 1 or from_zero > 1.1 * kept


@pytest.mark.parametrize("top", [1, 5])
def test_the_head_finds_the_top_where_large_inputs_meet_large_weights(tmp_path: Path, top: int) -> None:
    """One input is a hundred times the others, and its group of weights six times: distances depend on scales there."""
    made = sparse_model(CONFIG.replace(hidden_size=1024, intermediate_size=512, num_layers=1, num_heads=8)).float()
    made.final_layernorm.weight.data[5] *= 100
    made.lm_head.weight.data[:, :32] *= 6
    hub.save_model(made, None, tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "p44", "p44")
    decoder = load_decoder(tmp_path / "p44", kv_dtype="float32")
    (rows,) = decoder.forward([Chunk(decoder.new_sequence(len(IDS)), IDS, "all")], exact_top=top)
    (full,) = decoder.forward([Chunk(decoder.new_sequence(len(IDS)), IDS, "all")])
    assert np.array_equal(np.sort(rows, 1)[:, -top:], np.sort(full, 1)[:, -top:])


def test_the_head_ranks_around_the_final_norms_bias(model: PersimmonModel, packed: Path) -> None:
    """About as many words are refined as the bounds ask for; with distances from zero it would be many times more."""
    decoder = load_decoder(packed, kv_dtype="float32")
    (rows,) = decoder.forward([Chunk(decoder.new_sequence(len(IDS)), IDS, "all")], exact_top=1)
    (full,) = decoder.forward([Chunk(decoder.new_sequence(len(IDS)), IDS, "all")])
    assert np.array_equal(rows.argmax(1), full.argmax(1)) and np.array_equal(rows.max(1), full.max(1))
    arrays = open_packed(packed).map()
    planes = read_planes(np.array(arrays["lm_head.top"]), np.array(arrays["lm_head.rest"]))
    x, center = normed(model, "final_layernorm"), model.final_layernorm.bias.detach().numpy()
    estimates = _native.round_trip(x) @ planes.coarse.T + planes.shift
    best = (_native.round_trip(x) @ planes.floats.T).max(1, keepdims=True)
    asked, from_zero = (
        np.mean(estimates + 6 * deviations(planes, x, c) >= best) for c in (center, np.zeros_like(center))
    )
    assert asked / 2 < np.isfinite(rows).mean() < 2 * asked < from_zero / 4


def test_the_help_names_the_default_margin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"inf skips none (cpu engine, default {DEFAULT_MARGIN:g})" in words
