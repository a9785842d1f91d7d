"""The training kernels against plain PyTorch in float64, on every instruction set, and the model that uses them."""

from __future__ import annotations

import functools
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon.bench.train import RandomRows, TrainWork
from persimmon.config import ModelConfig
from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel, apply_rotary, attend_documents, document_positions
from persimmon.train import kernels
from persimmon.train.activations import keep_activations
from persimmon.train.attention import DocumentAttention
from persimmon.train.fused import in_use, use_kernels
from persimmon.train.loop import LoopRecipe, Trainer
from persimmon.train.loss import IGNORE, chunked_cross_entropy
from persimmon.train.memory import keep_freed_memory
from persimmon.train.parallel import World
from persimmon.train.sparsity import LayerStatistics

if not kernels.available():
    pytest.skip("the cpu engine is not built", allow_module_level=True)

from persimmon.fast.cpu.native_module import native

NATIVE: Any = native()
ISAS = NATIVE.supported_isas()
EXACT = 2e-6
"""Relative error (norm of the difference by norm) of float32: sums of up to a few hundred terms, exp to 2e-7."""
ROUNDED = 2e-2
"""The same where inputs, probabilities and results are bfloat16: a few of its steps of 2^-8."""


def off_by(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))


# -- attention ---------------------------------------------------------------------------------------------------

SHAPES = [
    # heads, head_dim, tokens, documents
    (2, 32, 300, [0, 300]),
    (3, 32, 260, [0, 1, 50, 130, 140, 260]),
    (2, 8, 40, [0, 7, 40]),
    (1, 64, 500, [0, 20, 500]),
    (2, 40, 200, [0, 200]),
    (1, 128, 130, [0, 129, 130]),
]


def plain_attention(fused: Tensor, norms: list[Tensor], cos: Tensor, sin: Tensor, documents: list[int]) -> Tensor:
    """What the kernels compute, in the dtype of the tensors."""
    tokens, heads, _, dim = fused.shape
    q, k, v = (x[None] for x in fused.unbind(2))
    if norms:
        q, k = F.layer_norm(q, (dim,), *norms[:2], 1e-5), F.layer_norm(k, (dim,), *norms[2:], 1e-5)
    tables = (table[None, :, None] for table in (cos, sin))
    cos, sin = tables
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    out = attend_documents(*(x.transpose(1, 2) for x in (q, k, v)), documents)
    return out.transpose(1, 2).reshape(tokens, heads, dim)


def native_attention(
    fused: Tensor, norms: list[Tensor], cos: Tensor, sin: Tensor, documents: list[int], grad: Tensor, isa: str
) -> list[Tensor]:
    """Output, gradient of the fused projection, gradients of the norms' parameters."""
    tokens, heads, _, dim = fused.shape
    padded = -(-dim // NATIVE.HEAD_VECTOR) * NATIVE.HEAD_VECTOR
    weights = norms or [None] * 4
    packed, normalizer = torch.empty(3, heads, tokens, padded), torch.empty(heads, tokens)
    out, grad_fused, grads = torch.empty_like(grad), torch.empty_like(fused), torch.empty_like(packed)
    sums = torch.empty(-(-tokens // NATIVE.TOKEN_CHUNK), 4, padded)
    NATIVE.heads_forward(fused, cos, sin, *weights, 1e-5, packed, 2, isa)
    NATIVE.attention_forward(packed, documents, out, normalizer, 2, isa)
    NATIVE.attention_backward(packed, documents, out, normalizer, grad, grads, 2, isa)
    NATIVE.heads_backward(fused, cos, sin, *weights, 1e-5, grads, grad_fused, sums, 2, isa)
    return [out, grad_fused, *(sums.sum(0)[:, :dim] if norms else [])]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "dim", "tokens", "documents"), SHAPES)
def test_attention_and_its_gradients(
    heads: int, dim: int, tokens: int, documents: list[int], isa: str, dtype: torch.dtype, normed: bool
) -> None:
    generator = torch.Generator().manual_seed(dim)
    fused = torch.randn(tokens, heads, 3, dim, generator=generator).to(dtype)
    angles = 6 * torch.rand(tokens, dim // 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    norms = [1 + 0.3 * torch.randn(dim, generator=generator) for _ in range(4)] if normed else []
    grad = torch.randn(tokens, heads, dim, generator=generator).to(dtype)

    exact = [x.double().requires_grad_() for x in (fused, *norms)]
    out = plain_attention(exact[0], exact[1:], cos.double(), sin.double(), documents)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
    found = native_attention(fused, norms, cos, sin, documents, grad, isa)
    limit = EXACT if dtype is torch.float32 else ROUNDED
    for name, a, b in zip(("out", "fused", "qw", "qb", "kw", "kb"), found, wanted, strict=False):
        # Keys' biases turn all scores of a query alike but for rotary: small sums of large terms.
        assert off_by(a, b) < (limit if name != "kb" else 4 * limit), name


def test_scores_that_overflow_an_exponential() -> None:
    """Queries and keys of size 1,000: the maximum is taken off before anything is raised."""
    fused = 1000 * torch.randn(70, 1, 3, 32, generator=torch.Generator().manual_seed(0))
    turn = torch.ones(70, 8), torch.zeros(70, 8)
    for isa in ISAS:
        out, grad, *_ = native_attention(fused, [], *turn, [0, 70], torch.ones(70, 1, 32), isa)
        wanted = plain_attention(fused.double(), [], turn[0].double(), turn[1].double(), [0, 70])
        assert off_by(out, wanted) < 1e-4 and grad.isfinite().all()  # one unit in the last place of a score of 1e6


def packed_attention(packed: Tensor, documents: list[int], grad: Tensor, isa: str) -> list[Tensor]:
    """Output [M, N, D] and gradients [3, N, M, D] of packed queries, keys and values."""
    out, normalizer, grads = torch.empty_like(grad), torch.empty(packed.shape[1:3]), torch.empty_like(packed)
    NATIVE.attention_forward(packed, documents, out, normalizer, 2, isa)
    NATIVE.attention_backward(packed, documents, out, normalizer, grad, grads, 2, isa)
    return [out, *grads[..., : grad.shape[-1]]]


def torch_attention(packed: Tensor, documents: list[int], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by PyTorch."""
    inputs = [x[None, ..., : grad.shape[-1]].to(dtype).requires_grad_() for x in packed]
    out = attend_documents(*inputs, documents)[0].transpose(0, 1)
    return [out.detach(), *(x[0] for x in torch.autograd.grad(out, inputs, grad.to(dtype)))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dim", "queries", "grads"), [(32, 1, 1), (64, 1, 1), (48, 1, 1), (32, 20, 1), (32, 1, 1e-25), (32, 0, 1)]
)
def test_float32_attention_is_as_exact_as_pytorchs(dim: int, queries: float, grads: float, isa: str) -> None:
    """Against float64, with scores of any size, tiny gradients and queries that are all zero.

    Vectors add one term after the other, tiles and PyTorch by blocks: their error grows less with the number of terms.
    """
    more = 1 if isa == "amx" else 4
    documents, generator = [0, 1, 2, 700, 765, 800], torch.Generator().manual_seed(dim)
    packed = torch.randn(3, 2, 800, -(-dim // 16) * 16, generator=generator)
    packed[..., dim:] = 0
    packed[0] *= queries
    grad = grads * torch.randn(800, 2, dim, generator=generator)
    exact = torch_attention(packed, documents, grad, torch.float64)
    plain = torch_attention(packed, documents, grad, torch.float32)
    for name, a, b, c in zip("oqkv", packed_attention(packed, documents, grad, isa), plain, exact, strict=True):
        scale = float(c.norm()) or 1.0
        found, wanted = (float((x.double() - c).norm()) / scale for x in (a, b))
        assert found <= 2 * more * wanted + 1e-7, (name, found, wanted)
        largest, allowed = (float((x.double() - c).abs().max() / c.abs().max().clamp_min(1e-30)) for x in (a, b))
        assert largest <= 3 * more * allowed + 3e-7, (name, largest, allowed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_none_and_in_its_document(isa: str, bad: float) -> None:
    packed = torch.randn(3, 1, 300, 32, generator=torch.Generator().manual_seed(0))
    clean = packed_attention(packed, [0, 100, 300], torch.ones(300, 1, 32), isa)
    packed[2, 0, 150, 3] = bad
    out, *grads = packed_attention(packed, [0, 100, 300], torch.ones(300, 1, 32), isa)
    assert not out[150:, 0, 3].isfinite().any() and not grads[0][:, 150:].isfinite().all()
    assert torch.equal(out[:100], clean[0][:100])
    assert all(torch.equal(a[:, :100], b[:, :100]) for a, b in zip(grads, clean[1:], strict=True))


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_results_do_not_depend_on_threads_or_other_documents(dtype: torch.dtype) -> None:
    tokens, heads, dim = 400, 2, 32
    packed = torch.randn(3, heads, tokens, dim, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(2)).to(dtype)

    def run(packed: Tensor, documents: list[int], grad: Tensor, threads: int) -> tuple[Tensor, Tensor]:
        out, normalizer, grads = torch.empty_like(grad), torch.empty(packed.shape[1:3]), torch.empty_like(packed)
        NATIVE.attention_forward(packed, documents, out, normalizer, threads)
        NATIVE.attention_backward(packed, documents, out, normalizer, grad, grads, threads)
        return out, grads

    documents = [0, 90, 290, 400]
    first = run(packed, documents, grad, 1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(packed, documents, grad, threads), strict=True))
    for a, b in pairwise(documents):
        alone = run(packed[:, :, a:b].contiguous(), [0, b - a], grad[a:b].contiguous(), 2)
        assert torch.equal(alone[0], first[0][a:b]) and torch.equal(alone[1], first[1][:, :, a:b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": [0, 5]}, "documents must run over all tokens"),
        ({"documents": [0, 6, 6, 10]}, "documents must ascend"),
        ({"packed": torch.zeros(3, 2, 9, 16)}, "packed heads have the wrong shape"),
        ({"out": torch.zeros(10, 2, 8, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"normalizer": torch.zeros(2, 9)}, "normalizer has the wrong shape"),
    ],
)
def test_shapes_are_checked(change: dict[str, Any], message: str) -> None:
    given = {
        "packed": torch.zeros(3, 2, 10, 16), "documents": [0, 10], "out": torch.zeros(10, 2, 8),
        "normalizer": torch.zeros(2, 10), "threads": 1,
    }  # fmt: skip
    NATIVE.attention_forward(**given)
    with pytest.raises(ValueError, match=message):
        NATIVE.attention_forward(**{**given, **change})


# -- squared ReLU, softmax -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_squared_relu(isa: str, dtype: torch.dtype) -> None:
    tokens, neurons = 300, 45
    x = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[:, 3] = 0.0, -1.0
    y, chunks = torch.empty_like(x), -(-tokens // NATIVE.TOKEN_CHUNK)
    active, sums = torch.empty(chunks, neurons, dtype=torch.int32), torch.empty(chunks)
    NATIVE.squared_relu(x, y, active, sums, 2, isa)
    assert torch.equal(y, x.relu().square())
    assert torch.equal(active.sum(0), (x > 0).sum(0))
    assert float(sums.sum()) == pytest.approx(float(x.double().relu().sum()), rel=1e-6)
    grad = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.where(x > 0, 2 * x.double() * grad.double() + 0.25, 0.0)
    NATIVE.squared_relu_backward(x, grad, 0.25, 2, isa)
    torch.testing.assert_close(grad, wanted.to(dtype))


@pytest.mark.parametrize("vocab", [5, 16, 333])
@pytest.mark.parametrize("isa", ISAS)
def test_softmax_gradient(isa: str, vocab: int) -> None:
    logits = 20 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    targets = torch.randint(vocab, (9,), generator=torch.Generator().manual_seed(0))
    targets[4], logits[5], logits[5, 1] = IGNORE, -1e30, 3.0
    targets[5] = 1
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    losses.sum().mul(0.125).backward()
    found = torch.empty(9)
    NATIVE.softmax_gradient(logits, targets, IGNORE, 0.125, found, 2, isa)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    # A probability near one is known to a few units in the last place of float32.
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=5e-7)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        NATIVE.softmax_gradient(logits, torch.full((9,), vocab), IGNORE, 0.125, found, 2, isa)


@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_with_the_kernel(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 24, generator=generator), torch.randn(90, 24, generator=generator)
    targets = torch.randint(90, (70,), generator=generator)
    targets[::7] = IGNORE

    def run(fused: bool) -> list[Tensor]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chunked_cross_entropy(*inputs, targets, scale=1 / 60, chunk=32, fused=fused)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert off_by(found, wanted) < (1e-2 if autocast else 1e-6)


# -- the model -------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=64, intermediate_size=100, num_layers=2, num_heads=2, bos_token_id=0, eos_token_id=0
)
DOCUMENTS = [0, 30, 90, 91, 180]


def made_model(dtype: torch.dtype = torch.float32) -> PersimmonModel:
    """Weights far from the initialisation, so that every parameter matters."""
    model = PersimmonModel(CONFIG)
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def gradients(
    model: PersimmonModel, autocast: bool = False, observe: LayerStatistics | None = None
) -> dict[str, Tensor]:
    """Hidden states of two rows of packed documents, and the gradients of a fixed functional of them."""
    ids = torch.randint(CONFIG.vocab_size, (2, 90), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.features(
            ids,
            positions=document_positions(DOCUMENTS, 2, 90),
            attend=DocumentAttention(DOCUMENTS, 2, 90),
            observe=observe,
        )
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    loss = (hidden * weights.to(hidden)).sum()
    if observe is not None:
        loss = loss + 50 * observe.penalty()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **found}


@pytest.mark.parametrize("autocast", [False, True])
def test_model_with_kernels(autocast: bool) -> None:
    exact = gradients(made_model(torch.float64))
    model = made_model()
    assert use_kernels(model) and in_use(model) and not in_use(made_model())
    found, again = gradients(model, autocast), made_model()
    assert found.keys() == exact.keys()
    for name in exact:
        assert off_by(found[name], exact[name]) < (0.06 if autocast else 1e-5), name
    use_kernels(again)
    repeated = gradients(again, autocast)
    assert all(torch.equal(found[name], repeated[name]) for name in exact)


def test_penalty_and_counts_with_kernels() -> None:
    statistics = [LayerStatistics(2, target=1.0) for _ in range(2)]
    plain, model = made_model(), made_model()
    use_kernels(model)
    wanted, found = gradients(plain, observe=statistics[0]), gradients(model, observe=statistics[1])
    assert torch.equal(statistics[0].counts(), statistics[1].counts())
    for name in wanted:
        assert off_by(found[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("choice", ["selective", "none"])
def test_recomputing_blocks_with_kernels(choice: str) -> None:
    whole, model = made_model(), made_model()
    use_kernels(whole)
    use_kernels(model)
    keep_activations(model, choice)
    wanted, found = gradients(whole), gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_dtypes_and_ways_to_attend_take_the_plain_methods() -> None:
    double, plain = made_model(torch.float64), made_model(torch.float64)
    use_kernels(double)
    ids = torch.arange(50)[None]
    assert torch.equal(double.features(ids), plain.features(ids))
    single = made_model()
    use_kernels(single)
    seen: list[tuple[int, ...]] = []
    found = single.features(ids, observe=lambda layer, active: seen.append(tuple(active.shape)))
    assert torch.equal(found, made_model().features(ids)) and seen == [(1, 50, 100)] * 2


def test_the_recipe_chooses(tmp_path: Path) -> None:
    losses = {}
    for choice in ("plain", "auto"):
        model = made_model()
        rows = RandomRows(TrainWork(CONFIG, length=64, rows=3, documents=20))
        recipe = LoopRecipe(kernels=choice, micro_tokens=128)
        trainer = Trainer(model, rows, 3, recipe, tmp_path / choice, World())
        assert in_use(model) == (choice == "auto")
        losses[choice] = [trainer.train_step()["loss"] for _ in range(3)]
    assert losses["auto"] == pytest.approx(losses["plain"], rel=1e-4)  # Muon enlarges rounding of small directions
    with pytest.raises(ConfigError, match="kernels must be one of auto, plain"):
        LoopRecipe(kernels="fast")


@pytest.mark.skipif("PERSIMMON_SANITIZED_NATIVE" in os.environ, reason="the sanitizers bring an allocator of their own")
def test_freed_memory_is_kept_where_the_library_can() -> None:
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_head_dimension_without_kernels() -> None:
    assert [dim for dim in (8, 32, 96, 112, 256, 272) if not kernels.knows_head_dim(dim)] == [112, 272]
    config = ModelConfig(
        vocab_size=60, hidden_size=112, intermediate_size=8, num_layers=1, num_heads=1, bos_token_id=0, eos_token_id=0
    )
    model = PersimmonModel(config)
    assert not use_kernels(model) and not in_use(model)
    assert not isinstance(model.layers[0].self_attn.forward, functools.partial)
