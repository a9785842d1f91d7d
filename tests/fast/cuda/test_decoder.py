"""The whole decoder in every format of weights and cache, held to the reference model with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triton_interpreter
from made_adapters import write_random_adapter
from persimmon.checkpoints import hub
from persimmon.checkpoints.directory import open_directory
from persimmon.errors import InputError, UnavailableError
from persimmon.fast.cpu.packed import open_packed
from persimmon.fast.cuda import weights
from persimmon.fast.cuda.choice import DENSE, SPARSE
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.kernels.matmul import dequantize
from persimmon.fast.cuda.layouts import Matrix
from persimmon.fast.cuda.load import load_decoder
from persimmon.fast.cuda.network import Network
from persimmon.fast.cuda.plan import device_kv_bytes_per_token
from persimmon.fast.cuda.weights import Weights
from persimmon.infer.decoder import Chunk
from persimmon.model import PersimmonModel

DEVICE = torch.device(triton_interpreter.DEVICE)
IDS = np.random.default_rng(0).integers(0, 320, 24).tolist()


def load_weights(name: str, checkpoint: Path, packed: dict[str, Path], dtype: torch.dtype) -> Weights:
    if name in ("q8", "q4", "p44"):
        opened = open_packed(packed[name])
        return weights.from_packed(opened, opened.config, DEVICE, dtype)
    if name == "fp8" and dtype is torch.float32:
        return weights.from_model(hub.load_model(checkpoint, dtype=torch.float32).to(DEVICE), fp8=True)
    directory = open_directory(checkpoint)
    return weights.from_directory(directory, directory.config, name, DEVICE)


def same_numbers(loaded: Weights) -> PersimmonModel:
    """The reference model with the numbers that the weights stand for."""
    model = PersimmonModel(loaded.config)
    state = {name: p for name, p in model.named_parameters()}

    def put(name: str, matrix: Matrix) -> None:
        numbers = dequantize(matrix, torch.float32).float()
        state[name].data.copy_(numbers.T if matrix.neuron_major else numbers)

    with torch.no_grad():
        state["embed_tokens.weight"].copy_(loaded.embedding)
        put("lm_head.weight", loaded.head)
        vectors = {"final_layernorm": (loaded.final_norm.weight, loaded.final_norm.bias)}
        for index, layer in enumerate(loaded.layers):
            prefix, q_norm = f"layers.{index}.", layer.qk_norms
            assert q_norm is not None
            put(prefix + "self_attn.query_key_value.weight", layer.query_key_value)
            put(prefix + "self_attn.dense.weight", layer.dense)
            put(prefix + "mlp.dense_h_to_4h.weight", layer.up)
            put(prefix + "mlp.dense_4h_to_h.weight", layer.down)
            state[prefix + "self_attn.query_key_value.bias"].copy_(layer.query_key_value_bias)
            state[prefix + "self_attn.dense.bias"].copy_(layer.dense_bias)
            state[prefix + "mlp.dense_h_to_4h.bias"].copy_(layer.up_bias)
            state[prefix + "mlp.dense_4h_to_h.bias"].copy_(layer.down_bias)
            vectors |= {
                prefix + "input_layernorm": (layer.input_norm.weight, layer.input_norm.bias),
                prefix + "post_attention_layernorm": (layer.post_norm.weight, layer.post_norm.bias),
                prefix + "self_attn.q_layernorm": q_norm[:2],
                prefix + "self_attn.k_layernorm": q_norm[2:],
            }
        for name, (gain, shift) in vectors.items():
            state[name + ".weight"].copy_(gain)
            state[name + ".bias"].copy_(shift)
    return model.eval()


def run(decoder: CudaDecoder) -> np.ndarray:
    """A long piece, a short one, then single tokens."""
    sequence, parts = decoder.new_sequence(len(IDS)), []
    for start, end in ((0, 18), (18, 22), (22, 23), (23, 24)):
        parts += decoder.forward([Chunk(sequence, IDS[start:end], "all")])
    return np.concatenate(parts)


@pytest.mark.parametrize("table", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["float32", "fp8", "q8", "q4", "p44"])
def test_every_format_is_the_reference_with_its_numbers(
    name: str, table: object, checkpoint: Path, packed: dict[str, Path]
) -> None:
    """Activations in float32, so nothing but the order of sums differs; p44 with an infinite margin."""
    loaded = load_weights(name, checkpoint, packed, torch.float32)
    assert loaded.format == name
    with torch.inference_mode():
        expected = same_numbers(loaded)(torch.tensor([IDS]))[0].numpy()
    decoder = CudaDecoder(loaded, cache_tokens=128, table=table)
    np.testing.assert_allclose(run(decoder), expected, rtol=1e-4, atol=2e-4)
    assert (run(decoder).argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "q8", "q4", "p44"])
def test_bfloat16_activations_stay_close(name: str, checkpoint: Path, packed: dict[str, Path]) -> None:
    """Mean KL in nats to float32 with the same numbers; the interpreter cuts bfloat16, which is worse than rounding."""
    loaded = load_weights(name, checkpoint, packed, torch.bfloat16)
    with torch.inference_mode():
        expected = torch.log_softmax(same_numbers(loaded)(torch.tensor([IDS]))[0], -1)
    found = torch.log_softmax(torch.from_numpy(run(CudaDecoder(loaded, cache_tokens=128, table=SPARSE))), -1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 5e-3


def test_products_before_float32_sums_are_not_rounded(checkpoint: Path) -> None:
    """Logits, attention's and the MLP's output of bfloat16 weights are float32 sums at any number of tokens."""
    loaded = load_weights("bfloat16", checkpoint, {}, torch.bfloat16)
    network, layer = Network(loaded, DENSE), loaded.layers[0]
    generator = torch.Generator().manual_seed(1)
    wide, narrow = (torch.randn(70, n, generator=generator).to(DEVICE, torch.bfloat16) for n in (150, 80))
    with torch.inference_mode():
        for tokens in (1, 2, 16, 70):
            x, hidden = narrow[:tokens], wide[:tokens]
            found = (
                (network.logits(x), x.float() @ loaded.head.codes.float().T),
                (network._product(x, layer.dense, None, None, torch.float32), x.float() @ layer.dense.codes.float().T),
                (network._down(hidden, layer.down, skip=False).sum(0), hidden.float() @ layer.down.codes.float()),
            )
            for result, expected in found:
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kv_dtype", "limit"), [("bfloat16", 1e-3), ("int8", 1e-3), ("fp8", 2e-2)])
def test_small_caches_stay_close(kv_dtype: str, limit: float, checkpoint: Path) -> None:
    loaded = load_weights("float32", checkpoint, {}, torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(same_numbers(loaded)(torch.tensor([IDS]))[0], -1)
    decoder = CudaDecoder(loaded, cache_tokens=128, kv_dtype=kv_dtype)
    assert decoder.kv_dtype == kv_dtype and decoder.token_bytes == device_kv_bytes_per_token(decoder.config, kv_dtype)
    found = torch.log_softmax(torch.from_numpy(run(decoder)), -1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < limit


def test_blocks_go_back_when_sequences_end(checkpoint: Path) -> None:
    decoder = CudaDecoder(load_weights("float32", checkpoint, {}, torch.float32), cache_tokens=192)
    first, second = decoder.new_sequence(100), decoder.new_sequence(100)
    decoder.forward([Chunk(first, IDS * 4, "none"), Chunk(second, IDS[:10], "none")])
    with pytest.raises(UnavailableError, match="cache is full: 1 more blocks are needed, 0 of 3"):
        decoder.forward([Chunk(second, IDS * 3, "none")])
    assert (first.length, second.length) == (96, 10)
    del first
    decoder.forward([Chunk(second, IDS * 3, "none")])
    second.close()
    with pytest.raises(UnavailableError, match="planned for 192"):
        decoder.new_sequence(193)


def test_an_adapter_is_merged_while_loading(checkpoint: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    adapted = write_random_adapter(checkpoint, tmp_path / "adapter")
    options: dict[str, Any] = {"device": str(DEVICE), "dtype": "float32", "context": 64}
    plain = run(load_decoder(checkpoint, **options))
    merged = run(load_decoder(checkpoint, adapter=tmp_path / "adapter", **options))
    with torch.inference_mode():
        expected = adapted(torch.tensor([IDS]))[0].numpy()
    assert abs(plain - expected).max() > 0.1, "an adapter that changes nothing tests nothing"
    np.testing.assert_allclose(merged, expected, rtol=2e-4, atol=2e-4)
    with pytest.raises(UnavailableError, match="is quantized and takes no adapter"):
        load_decoder(packed["q4"], device=str(DEVICE), adapter=tmp_path / "adapter")


def test_loading(checkpoint: Path, packed: dict[str, Path]) -> None:
    """Both kinds of directories, the planner's choices, and options that cannot be."""
    decoder = load_decoder(checkpoint, device=str(DEVICE), dtype="float32", context=512)
    assert (decoder.name, decoder.context, decoder.kv_dtype, decoder.weights.format) == (
        "cuda",
        512,
        "float32",
        "float32",
    )
    assert decoder.new_sequence(512).capacity == 512
    small = load_decoder(packed["q4"], device=str(DEVICE), kv_dtype="int8", context=512)
    assert (small.weights.format, small.kv_dtype, small.weights.dtype) == ("q4", "int8", torch.bfloat16)
    with pytest.raises(InputError, match="fp8 applies to unpacked weights, these are q4"):
        load_decoder(packed["q4"], device=str(DEVICE), fp8=True)
    with pytest.raises(InputError, match=r"kernel table .* does not exist"):
        load_decoder(checkpoint, device=str(DEVICE), dtype="float32", context=512, kernel_table="nowhere.json")
    for options, message in (({"kv_dtype": "int4"}, "int4"), ({"sparsity_margin": -1.0}, "sparsity_margin")):
        with pytest.raises(InputError, match=message):
            CudaDecoder(decoder.weights, **options)
