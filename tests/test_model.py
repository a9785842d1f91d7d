"""The reference model against its definition written out in NumPy, and the properties every engine relies on."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persimmon.config import PRESETS, ModelConfig
from persimmon.errors import ContextLengthError, InputError
from persimmon.model import (
    PersimmonModel,
    attend_causal,
    check_dtype,
)
from tiny_model import tiny_config, tiny_ids, tiny_model

# -- the definition, head by head and token by token --------------------------------------------------


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def rotate(x: np.ndarray, position: int, config: ModelConfig) -> np.ndarray:
    """One head [D] at one position: dimension i turns with i + R / 2."""
    half, out = config.rotary_dim // 2, x.copy()
    for i in range(half):
        frequency = np.float32(1.0 / config.rotary_base ** (2 * i / config.rotary_dim))
        angle = float(np.float32(position) * frequency)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def written_out(weights: dict[str, np.ndarray], config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Logits [T, V] in float64 from the description of the model alone."""

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    tokens, dim = len(ids), config.head_dim
    x = weights["embed_tokens.weight"][ids]
    for layer in range(config.num_layers):
        at = f"layers.{layer}"
        fused = linear(f"{at}.self_attn.query_key_value", norm(f"{at}.input_layernorm", x))
        heads = np.zeros_like(x)
        for head in range(config.num_heads):
            q, k, v = (fused[:, (3 * head + part) * dim : (3 * head + part + 1) * dim] for part in range(3))
            if config.qk_layernorm:
                q, k = norm(f"{at}.self_attn.q_layernorm", q), norm(f"{at}.self_attn.k_layernorm", k)
            q = np.stack([rotate(row, position, config) for position, row in enumerate(q)])
            k = np.stack([rotate(row, position, config) for position, row in enumerate(k)])
            for t in range(tokens):
                shares = np.exp(k[: t + 1] @ q[t] / math.sqrt(dim))
                heads[t, head * dim : (head + 1) * dim] = shares / shares.sum() @ v[: t + 1]
        x = x + linear(f"{at}.self_attn.dense", heads)
        neurons = linear(f"{at}.mlp.dense_h_to_4h", norm(f"{at}.post_attention_layernorm", x))
        x = x + linear(f"{at}.mlp.dense_4h_to_h", np.maximum(neurons, 0.0) ** 2)
    return norm("final_layernorm", x) @ weights["lm_head.weight"].T


SHAPES: list[dict[str, Any]] = [
    {},
    {"num_heads": 1},
    {"hidden_size": 32, "num_heads": 8, "partial_rotary_factor": 1.0},
    {"hidden_size": 36, "num_heads": 3, "partial_rotary_factor": 0.34},
    {"hidden_size": 40, "num_heads": 5, "partial_rotary_factor": 0.25, "rotary_base": 20_000.0, "layer_norm_eps": 1e-3},
    {"qk_layernorm": False, "num_layers": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_written_out(shape: dict[str, Any]) -> None:
    model = tiny_model(**shape).double()
    ids = tiny_ids(model.config, 2, 19)
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    expected = np.stack([written_out(weights, model.config, row) for row in ids.tolist()])
    scale = float(np.abs(expected).max())
    # The tables of cos and sin are float32 whatever the model's dtype: hence not 1e-12.
    np.testing.assert_allclose(model(ids).detach().numpy(), expected, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(model.float()(ids).detach().numpy(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_fused_rows_are_heads_then_qkv_then_dims(num_heads: int) -> None:
    """The order [3, heads, head_dim] fits every shape too; only the numbers tell, unless there is one head."""
    model = tiny_model(hidden_size=32, num_heads=num_heads)
    config, ids = model.config, tiny_ids(model.config, 1, 12)
    expected = model(ids)
    with torch.no_grad():
        for block in model.layers:
            for parameter in block.self_attn.query_key_value.parameters():
                fused = parameter.view(num_heads, 3, config.head_dim, -1)
                parameter.copy_(fused.transpose(0, 1).reshape(parameter.shape))
    difference = float((model(ids) - expected).detach().abs().max())
    assert difference == 0.0 if num_heads == 1 else difference > 0.1


def test_parameters_are_the_hubs_580_tensors() -> None:
    with torch.device("meta"):
        model = PersimmonModel(PRESETS["8b"])
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert len(shapes) == 580
    assert sum(math.prod(shape) for shape in shapes.values()) == 9_397_175_296
    assert {name.replace("layers.7.", ""): shape for name, shape in shapes.items() if "layers.7." in name} == {
        "input_layernorm.weight": [4096],
        "input_layernorm.bias": [4096],
        "self_attn.query_key_value.weight": [12288, 4096],
        "self_attn.query_key_value.bias": [12288],
        "self_attn.dense.weight": [4096, 4096],
        "self_attn.dense.bias": [4096],
        "self_attn.q_layernorm.weight": [64],
        "self_attn.q_layernorm.bias": [64],
        "self_attn.k_layernorm.weight": [64],
        "self_attn.k_layernorm.bias": [64],
        "post_attention_layernorm.weight": [4096],
        "post_attention_layernorm.bias": [4096],
        "mlp.dense_h_to_4h.weight": [16384, 4096],
        "mlp.dense_h_to_4h.bias": [16384],
        "mlp.dense_4h_to_h.weight": [4096, 16384],
        "mlp.dense_4h_to_h.bias": [4096],
    }
    outside = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
    assert outside == {
        "embed_tokens.weight": [262144, 4096],
        "final_layernorm.weight": [4096],
        "final_layernorm.bias": [4096],
        "lm_head.weight": [262144, 4096],
    }
    assert not list(model.buffers())


def test_the_meta_device_imports_no_compiler() -> None:
    """PyTorch's own `normal_` there imports torch._dynamo, seconds before every start."""
    program = (
        "import sys, torch; from persimmon.config import PRESETS; from persimmon.model import PersimmonModel\n"
        "with torch.device('meta'): PersimmonModel(PRESETS['mini'])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_releases_dropout_is_never_applied() -> None:
    model = tiny_model(hidden_dropout=0.6)
    ids = tiny_ids(model.config, 1, 9)
    assert torch.equal(model.train()(ids), model.eval()(ids))


# -- dtypes ------------------------------------------------------------------------------------------


def test_float16_is_refused_with_the_reason() -> None:
    model = tiny_model().to(torch.float16)
    ids = tiny_ids(model.config, 1, 4)
    with pytest.raises(InputError, match=r"float16.*65504.*255\.9.*bfloat16"):
        model(ids)
    with torch.autocast("cpu", torch.float16), pytest.raises(InputError, match="float16"):
        model.float()(ids)
    with pytest.raises(InputError, match=r"dtype must be one of .*float32.*int8"):
        check_dtype(torch.int8)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    logits = model(tiny_ids(model.config, 2, 5))
    assert logits.shape == (2, 5, model.config.vocab_size)
    assert logits.dtype is expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_stays_near_float32(precision: str) -> None:
    model = tiny_model(rotary_precision=precision)
    ids = tiny_ids(model.config, 2, 30)
    exact, rounded = model(ids), model.bfloat16()(ids)
    assert float((exact - rounded).detach().abs().max()) < 0.25 * float(exact.detach().std())


def test_layernorm_statistics_are_float32_in_bfloat16() -> None:
    """A mean of 100 with a spread of 1: in bfloat16, with steps of 0.5 there, the variance would be lost."""
    model = tiny_model(hidden_size=256).to(torch.bfloat16)
    x = (100 + torch.randn(64, 256, generator=torch.Generator().manual_seed(1))).bfloat16()
    norm = model.final_layernorm
    expected = layer_norm(
        x.double().numpy(), norm.weight.double().detach().numpy(), norm.bias.double().detach().numpy(), 1e-5
    )
    # One rounding of the result; a second one of the product with the weight on kernels that store it.
    np.testing.assert_allclose(norm(x).detach().double().numpy(), expected, rtol=2**-7, atol=2**-7)


def test_softmax_is_float32_in_bfloat16() -> None:
    """The mean of 4,096 ones is 1; a bfloat16 sum stops at 256."""
    q = torch.zeros(1, 1, 4096, 8, dtype=torch.bfloat16)
    out = attend_causal(q, torch.randn_like(q), torch.ones_like(q))
    assert torch.equal(out, torch.ones_like(out))


# -- causality, batches, caches ----------------------------------------------------------------------


def test_later_tokens_change_nothing_before_them() -> None:
    model = tiny_model()
    ids = tiny_ids(model.config, 1, 30)
    changed = ids.clone()
    changed[0, 17:] = (changed[0, 17:] + 1) % model.config.vocab_size
    assert torch.equal(model(ids)[:, :17], model(changed)[:, :17])


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = tiny_model()
    ids = tiny_ids(model.config, 5, 23)
    together = model(ids)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


class ListCache:
    """The plainest cache: concatenate, and attend with an explicit mask."""

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0
        self._stored: list[list[Tensor]] = [[] for _ in range(config.num_layers)]

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        return self.length + torch.arange(num_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored = self._stored[layer]
        stored[:] = [torch.cat(pair, 2) for pair in zip(stored, (k, v), strict=True)] if stored else [k, v]
        scores = q @ stored[0].mT / q.shape[-1] ** 0.5
        allowed = torch.ones(scores.shape[-2:]).tril(self.length).bool()
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ stored[1]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens


@settings(deadline=None, max_examples=30)
@given(
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    precision=st.sampled_from(["float32", "bfloat16"]),
)
def test_prefill_in_any_chunking_is_the_whole(chunks: list[int], rows: int, precision: str) -> None:
    model = tiny_model(rotary_precision=precision).double()
    ids = tiny_ids(model.config, rows, sum(chunks), seed=len(chunks))
    cache = ListCache(model.config)
    pieces = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-10, rtol=0)


def test_cache_and_documents_exclude_each_other() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="exclude each other"):
        model(tiny_ids(model.config, 1, 4), documents=[0, 4], cache=ListCache(model.config))


def test_observer_sees_every_layers_activations_once() -> None:
    model = tiny_model()
    seen: list[tuple[int, Tensor]] = []
    model.features(tiny_ids(model.config, 2, 7), observe=lambda layer, active: seen.append((layer, active)))
    assert [layer for layer, _ in seen] == [0, 1]
    for _, active in seen:
        assert active.shape == (2, 7, model.config.intermediate_size)
        assert 0.2 < float((active == 0).float().mean()) < 0.8
        assert bool((active >= 0).all())


# -- limits ------------------------------------------------------------------------------------------


def test_the_whole_context_is_usable_and_no_more() -> None:
    model = tiny_model(max_positions=64)
    config = model.config
    assert model(tiny_ids(config, 1, 64)).shape == (1, 64, config.vocab_size)
    assert model(tiny_ids(config, 1, 1), positions=torch.tensor([63])).shape == (1, 1, config.vocab_size)
    with pytest.raises(ContextLengthError, match="65 tokens exceed the context of 64"):
        model(tiny_ids(config, 1, 65))
    with pytest.raises(ContextLengthError, match=r"\[0, 64\), got 60 to 64"):
        model(tiny_ids(config, 1, 5), positions=60 + torch.arange(5))
    with pytest.raises(ContextLengthError, match="got -1 to 3"):
        model(tiny_ids(config, 1, 5), positions=torch.arange(5) - 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    for shape in ((4,), (1, 2, 3), (1, 0), (0, 4)):
        with pytest.raises(InputError, match=r"token_ids must be \[rows, tokens\]"):
            model(torch.zeros(shape, dtype=torch.long))
    for positions in (torch.arange(4), torch.zeros(3, 5, dtype=torch.long)):
        with pytest.raises(InputError, match=r"positions must be \[5\] or \[2, 5\]"):
            model(tiny_ids(model.config, 2, 5), positions=positions)


@pytest.mark.slow
def test_16384_tokens_at_once_equal_16384_in_chunks() -> None:
    model = tiny_model(num_heads=1, num_layers=1)
    ids = tiny_ids(model.config, 1, 16384)
    cache = ListCache(model.config)
    with torch.inference_mode():
        whole = model.features(ids)
        for start in range(0, 16384, 512):
            part = model.features(ids[:, start : start + 512], cache=cache)
            torch.testing.assert_close(whole[:, start : start + 512], part, atol=1e-4, rtol=0)


# -- initialisation ----------------------------------------------------------------------------------


def test_initialisation_is_the_releases() -> None:
    config = tiny_config(hidden_size=128, intermediate_size=512, num_layers=8, vocab_size=500)
    model = PersimmonModel(config)
    model.initialize(torch.Generator().manual_seed(0))
    for name, parameter in model.state_dict().items():
        if name.endswith("layernorm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        else:
            output = name.endswith(("self_attn.dense.weight", "dense_4h_to_h.weight"))
            assert float(parameter.std()) == pytest.approx(0.02 / 4 if output else 0.02, rel=0.05), name
            assert abs(float(parameter.mean())) < 0.001, name


def test_initialisation_follows_its_generator_and_arguments() -> None:
    config = tiny_config(hidden_size=128)
    first, second = PersimmonModel(config), PersimmonModel(config)
    first.initialize(torch.Generator().manual_seed(7), std=0.1, output_std=0.0, head_std=0.001)
    second.initialize(torch.Generator().manual_seed(7), std=0.1, output_std=0.0, head_std=0.001)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert float(first.lm_head.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert float(first.embed_tokens.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    # With its output projections at zero every block is the identity.
    ids = tiny_ids(config, 1, 6)
    torch.testing.assert_close(first.features(ids), first.final_layernorm(first.embed_tokens(ids)))


# -- other devices -----------------------------------------------------------------------------------


def _same_on(device: str) -> None:
    """Logits, documents and gradients of a device against the CPU's."""
    for precision in ("float32", "bfloat16"):
        cpu, other = (tiny_model(rotary_precision=precision).to(place) for place in ("cpu", device))
        ids = tiny_ids(cpu.config, 2, 300)
        documents = [0, 100, 300, 310, 600]
        for kwargs in ({}, {"documents": documents}, {"positions": 16000 + torch.arange(300)}):
            expected, found = cpu(ids, **kwargs), other(ids.to(device), **kwargs)
            torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=0)
        expected.sum().backward()
        found.sum().backward()
        for (name, a), b in zip(cpu.named_parameters(), other.parameters(), strict=True):
            assert b.grad is not None
            torch.testing.assert_close(b.grad.cpu(), a.grad, atol=2e-2, rtol=2e-2, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_equals_the_cpu() -> None:
    _same_on("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device on this machine")
def test_mps_equals_the_cpu() -> None:
    _same_on("mps")
