"""The reference Persimmon decoder in plain PyTorch: the definition every faster path is held to.

What makes it Persimmon (each checked against the release's code, adept-inference `megatron/model/`):

* pre-LayerNorm blocks, attention then MLP, both residuals add the un-normalized stream, biases everywhere but the head;
* one fused projection whose rows are laid out [heads, 3, head_dim]: for every head its query, key, value;
* LayerNorm with bias over head_dim on queries and keys, one set per layer shared by the heads, *before* rotary;
* rotary on the leading half of each head, pairing dimension i with i + rotary_dim / 2, base 25000;
* an ungated MLP with relu(x)^2, about 90 % of whose values are exact zeros in a trained model;
* untied embedding and head, LayerNorm statistics and softmax in float32.

Shapes use these letters throughout:
    B batch rows   T new tokens per row   S keys per row   H hidden_size   N heads   D head_dim
    R rotary_dim   F intermediate_size    V vocab_size

Attention is a strategy: with nothing given every row is one causal document; `documents` keeps attention inside
the documents packed into the rows; a `cache` (infer/kv_cache.py) appends keys and values and attends to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon.config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, N, T, D], k, v) -> [B, N, T, D]."""

Observer = Callable[[int, Tensor], None]
"""Called with (layer, relu(pre-activation) [B, T, F]) by every MLP: sparsity statistics and penalties."""


class Cache(Protocol):
    """Keys and values of earlier tokens. One object serves all layers of one forward pass."""

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Positions [B, T] of the tokens about to be added; raises ContextLengthError when they do not fit."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [B, N, T, D] behind the earlier ones and attend causally: [B, N, T, D]."""

    def advance(self, num_tokens: int) -> None:
        """Count the tokens as stored, once all layers have run."""


def rotary_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [..., R / 2] in float32 for integer positions [...].

    `float32` computes exactly what every port does. `bfloat16` repeats the release's prefill: frequencies,
    positions and their products are each rounded to bfloat16 before cos and sin, so that only 1,025 distinct
    positions exist below 16,384 (flash-attn `layers/rotary.py` with `pos_idx_in_fp32=False`).
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
    inv_freq = config.rotary_base ** (-exponents / config.rotary_dim)
    if config.rotary_precision == "float32":
        angles = positions.to(torch.float32)[..., None] * inv_freq
        return angles.cos(), angles.sin()
    angles = positions.to(torch.bfloat16)[..., None] * inv_freq.to(torch.bfloat16)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of x [B, T, N, D] by cos, sin [B or 1, T, 1, R / 2]; the rest passes."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of every row to itself, [B, N, T, D]; scale 1/sqrt(D), PyTorch's fused kernels."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int]) -> Tensor:
    """Causal attention inside each document of the rows laid end to end.

    `boundaries` are offsets 0 = b0 < b1 < ... < bn = B * T into the flattened [B * T] tokens, and no document
    crosses a row. One fused call per document does no work across documents and needs no mask tensor;
    neighbouring documents of equal length share a call.
    """
    rows, heads, length, dim = q.shape
    flat = [x.transpose(1, 2).reshape(rows * length, heads, dim) for x in (q, k, v)]
    pieces = []
    for start, size, count in _equal_runs(boundaries):
        part = [x[start : start + size * count].view(count, size, heads, dim).transpose(1, 2) for x in flat]
        pieces.append(attend_causal(*part).transpose(1, 2).reshape(size * count, heads, dim))
    return torch.cat(pieces).view(rows, length, heads, dim).transpose(1, 2)


def _equal_runs(boundaries: Sequence[int]) -> list[tuple[int, int, int]]:
    """Group neighbouring documents of equal size: (start, size, count) of each group."""
    runs: list[tuple[int, int, int]] = []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        size = end - start
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0], size, runs[-1][2] + 1)
        else:
            runs.append((start, size, 1))
    return runs


def check_boundaries(boundaries: Sequence[int], num_rows: int, num_tokens: int) -> None:
    """Raise ValueError unless the boundaries cover all rows and no document crosses a row."""
    edges = set(boundaries)
    ascending = all(a < b for a, b in zip(boundaries, boundaries[1:], strict=False))
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != num_rows * num_tokens or not ascending:
        raise ValueError(f"document boundaries must ascend from 0 to {num_rows * num_tokens}")
    if any(row * num_tokens not in edges for row in range(num_rows)):
        raise ValueError("a document crosses the end of a row")


class Attention(nn.Module):
    """Multi-head attention with QK LayerNorm and partial rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, dim, eps = config.hidden_size, config.head_dim, config.layer_norm_eps
        self.layer = layer
        self.num_heads, self.head_dim = config.num_heads, dim
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.q_layernorm = nn.LayerNorm(dim, eps) if config.qk_layernorm else nn.Identity()
        self.k_layernorm = nn.LayerNorm(dim, eps) if config.qk_layernorm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """X [B, T, H] -> [B, T, H]."""
        rows, tokens, hidden = x.shape
        fused = self.query_key_value(x).view(rows, tokens, self.num_heads, 3, self.head_dim)
        q, k, v = fused.unbind(3)  # each [B, T, N, D]
        q = apply_rotary(self.q_layernorm(q), cos, sin)
        k = apply_rotary(self.k_layernorm(k), cos, sin)
        out = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.dense(out.transpose(1, 2).reshape(rows, tokens, hidden))


class MLP(nn.Module):
    """H -> F -> relu^2 -> H. No float16: relu(x)^2 leaves its range of 65504 once x passes 255.9."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, observe: Observer | None) -> Tensor:
        """X [B, T, H] -> [B, T, H]."""
        active = F.relu(self.dense_h_to_4h(x))
        if observe is not None:
            observe(self.layer, active)
        return self.dense_4h_to_h(active.square())


class Block(nn.Module):
    """Pre-LayerNorm attention, then pre-LayerNorm MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, observe: Observer | None) -> Tensor:
        """X [B, T, H] -> [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x), observe)


class PersimmonModel(nn.Module):
    """The whole decoder. Parameters are named as in the hub's files, without their leading `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def features(
        self,
        token_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Sequence[int] | None = None,
        cache: Cache | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """token_ids [B, T] -> final hidden states [B, T, H], ready for the head.

        positions: [T] or [B, T], default 0.. per row (or as the cache counts). documents: offsets as in
        `attend_documents`. cache: keys and values before these tokens; extended by them.
        """
        rows, tokens = token_ids.shape
        attend: Attend = lambda layer, q, k, v: attend_causal(q, k, v)  # noqa: E731
        if documents is not None:
            if cache is not None:
                raise ValueError("documents and cache exclude each other")
            check_boundaries(documents, rows, tokens)
            attend = lambda layer, q, k, v: attend_documents(q, k, v, documents)  # noqa: E731
        elif cache is not None:
            attend = cache.attend
            positions = cache.positions(rows, tokens) if positions is None else positions
        if positions is None:
            positions = torch.arange(tokens, device=token_ids.device)
        cos, sin = rotary_tables(self.config, positions)
        # [T, R/2] or [B, T, R/2] -> [1 or B, T, 1, R/2]
        cos, sin = (t.reshape(-1, tokens, 1, t.shape[-1]) for t in (cos, sin))
        x = self.embed_tokens(token_ids)
        for block in self.layers:
            x = block(x, cos, sin, attend, observe)
        if cache is not None:
            cache.advance(tokens)
        return self.final_layernorm(x)

    def forward(
        self,
        token_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Sequence[int] | None = None,
        cache: Cache | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """token_ids [B, T] -> logits [B, T, V] in float32; the arguments of `features`."""
        hidden = self.features(token_ids, positions=positions, documents=documents, cache=cache, observe=observe)
        return self.lm_head(hidden).float()

    @torch.no_grad()
    def initialize(
        self,
        generator: torch.Generator | None = None,
        *,
        std: float = 0.02,
        output_std: float | None = None,
        head_std: float | None = None,
    ) -> None:
        """Normal weights, zero biases, unit norms.

        The defaults are the release's: 0.02, and 0.02 / sqrt(2 * layers) for the two output projections of a block
        (adept-inference `megatron/model/utils.py`; what its run used is unpublished).
        """
        if output_std is None:
            output_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
                continue
            scale = std
            if name.endswith(("self_attn.dense.weight", "dense_4h_to_h.weight")):
                scale = output_std
            elif name == "lm_head.weight" and head_std is not None:
                scale = head_std
            parameter.normal_(0.0, scale, generator=generator)
