"""The reference Persimmon decoder in plain PyTorch: the definition every faster path is held to.

What makes it Persimmon (each checked against the release's code, adept-inference `megatron/model/`):

* pre-LayerNorm blocks, attention then MLP, both residuals add the un-normalized stream, biases everywhere but the head;
* one fused projection whose rows are laid out [heads, 3, head_dim]: for every head its query, key, value;
* LayerNorm with bias over head_dim on queries and keys, one set per layer shared by the heads, *before* rotary;
* rotary on the leading half of each head, pairing dimension i with i + rotary_dim / 2, base 25000;
* an ungated MLP with relu(x)^2, about 90 % of whose values are exact zeros in a trained model;
* untied embedding and head, LayerNorm statistics and softmax in float32;
* no dropout anywhere: the 0.6 of the released `config.json` is metadata (config.py).

It runs in float32, bfloat16 and, as an oracle, float64; float16 is refused (`check_dtype`). docs/numerics.md says
which results are exact and how far the others may differ.

Shapes use these letters throughout:
    B batch rows   T new tokens per row   H hidden_size   N heads   D head_dim
    R rotary_dim   F intermediate_size    V vocab_size

Attention is a strategy: with nothing given every row is one causal document; `documents` keeps attention inside
the documents packed into the rows; a `cache` (infer/kv_cache.py) appends keys and values and attends to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError, InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""What weights and activations may be."""

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


def check_dtype(dtype: torch.dtype) -> None:
    """Raise InputError unless the model can compute in `dtype`; loaders convert float16 files first."""
    if dtype is torch.float16:
        raise InputError("float16 is refused: relu(x)^2 exceeds its 65504 once x > 255.9; use bfloat16 or float32")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; from the host's memory to a CUDA device through pinned memory, in the order of its queue.

    To any other device the copy is waited for: it may read a temporary's memory after that was given away (MPS does).
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, [R / 2] float32 on the CPU: base^(-2i / R).

    Written as the release and every port write it, and always computed on the CPU: at position 16,383 one unit in
    the last place of a frequency turns the angle by up to 0.0005 rad.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    return 1.0 / (config.rotary_base**exponents)


def rotary_angles(config: ModelConfig, positions: Tensor) -> Tensor:
    """Angles in radians [..., R / 2] for integer positions [...], in the config's rotary precision.

    `float32` computes exactly what every port does. `bfloat16` repeats the release's prefill: frequencies, positions
    and their products are each rounded to bfloat16, so that only 1,025 distinct positions exist below 16,384
    (flash-attn `layers/rotary.py` with `pos_idx_in_fp32=False`).
    """
    dtype = torch.bfloat16 if config.rotary_precision == "bfloat16" else torch.float32
    frequencies = staged(inverse_frequencies(config).to(dtype), positions.device)
    return positions.to(dtype)[..., None] * frequencies


def rotary_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [..., R / 2] in float32 of the angles; under bfloat16 their values are rounded to it too."""
    angles = rotary_angles(config, positions)
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
    runs = _equal_runs(boundaries)
    # Split and not sliced: the gradient of a split is one concatenation, that of a slice a tensor of zeros for each.
    sizes = [size * count for size, count in runs]
    flat = [x.transpose(1, 2).reshape(rows * length, heads, dim).split(sizes) for x in (q, k, v)]
    pieces = []
    for (size, count), part in zip(runs, zip(*flat, strict=True), strict=True):
        run = (x.view(count, size, heads, dim).transpose(1, 2) for x in part)
        pieces.append(attend_causal(*run).transpose(1, 2).reshape(size * count, heads, dim))
    return torch.cat(pieces).view(rows, length, heads, dim).transpose(1, 2)


def _equal_runs(boundaries: Sequence[int]) -> list[tuple[int, int]]:
    """Group neighbouring documents of equal size: (size, count) of each group."""
    runs: list[tuple[int, int]] = []
    for start, end in pairwise(boundaries):
        size = end - start
        if runs and runs[-1][0] == size:
            runs[-1] = (size, runs[-1][1] + 1)
        else:
            runs.append((size, 1))
    return runs


def check_boundaries(boundaries: Sequence[int], num_rows: int, num_tokens: int) -> None:
    """Raise InputError unless the boundaries ascend over all rows and no document crosses the end of one."""
    total = num_rows * num_tokens
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != total:
        raise InputError(f"document boundaries must run from 0 to {total} ({num_rows} rows of {num_tokens} tokens)")
    for start, end in pairwise(boundaries):
        if end <= start:
            raise InputError(f"document boundaries must ascend, got {start} and then {end}")
        if start // num_tokens != (end - 1) // num_tokens:
            raise InputError(f"the document [{start}, {end}) crosses the end of a row of {num_tokens} tokens")


def document_positions(boundaries: Sequence[int], num_rows: int, num_tokens: int) -> Tensor:
    """Positions [B, T] that start at 0 in every document, for the `positions` argument of the model.

    Attention sees differences of positions only, so counting along the row gives the same up to rounding. Under
    `rotary_precision="bfloat16"` it does not: there a document deep inside a row would get coarse positions.
    """
    check_boundaries(boundaries, num_rows, num_tokens)
    edges = torch.tensor(boundaries)
    starts = edges[:-1].repeat_interleave(edges.diff())
    return (torch.arange(num_rows * num_tokens) - starts).view(num_rows, num_tokens)


def _choose_attention(documents: Sequence[int] | None, cache: Cache | None, rows: int, tokens: int) -> Attend:
    """How the tokens of one forward pass attend."""
    if cache is not None:
        if documents is not None:
            raise InputError("documents and cache exclude each other")
        return cache.attend
    if documents is None:
        return lambda layer, q, k, v: attend_causal(q, k, v)
    check_boundaries(documents, rows, tokens)
    return lambda layer, q, k, v: attend_documents(q, k, v, documents)


class Embedding(nn.Embedding):
    """nn.Embedding that stays uninitialised on the meta device, where `normal_` would import PyTorch's compiler.

    That import takes seconds, before every start of a program that loads its weights the lazy way.
    """

    def reset_parameters(self) -> None:
        """Fill the rows as PyTorch does, unless they have no memory."""
        if not self.weight.is_meta:
            super().reset_parameters()


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
        """Map x [B, T, H] to [B, T, H]."""
        rows, tokens, _ = x.shape
        # -1: under tensor parallelism (train/mesh.py) the projection yields this process's heads only.
        fused = self.query_key_value(x).view(rows, tokens, -1, 3, self.head_dim)
        q, k, v = fused.unbind(3)  # each [B, T, N, D]
        q = apply_rotary(self.q_layernorm(q), cos, sin)
        k = apply_rotary(self.k_layernorm(k), cos, sin)
        out = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.dense(out.transpose(1, 2).reshape(rows, tokens, -1))


class MLP(nn.Module):
    """H -> F, relu(x)^2, F -> H."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, observe: Observer | None) -> Tensor:
        """Map x [B, T, H] to [B, T, H]."""
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
        """Map x [B, T, H] to [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x), observe)


class PersimmonModel(nn.Module):
    """The whole decoder. Parameters are named as in the hub's files, without their leading `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
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
        attend: Attend | None = None,
    ) -> Tensor:
        """token_ids [B, T] -> final hidden states [B, T, H], ready for the head.

        Args:
            token_ids: integer ids below vocab_size.
            positions: [T] or [B, T], each in [0, max_positions); default 0, 1, .. per row, or as the cache counts. Best
                on the CPU: they are looked at, and reading a GPU's numbers waits for it.
                `document_positions` makes them start anew in every document.
            documents: offsets as in `attend_documents`; default one document per row.
            cache: keys and values before these tokens; extended by them. Excludes `documents`.
            observe: called once per layer with relu(pre-activation).
            attend: another way to attend (train/attention.py); excludes `documents` and `cache`.

        Raises:
            ContextLengthError: a position is max_positions or more.
            InputError: float16 weights or autocast, boundaries that do not fit, ids that are not [B, T].
        """
        if token_ids.dim() != 2 or not token_ids.numel():
            raise InputError(f"token_ids must be [rows, tokens], each at least 1, got {list(token_ids.shape)}")
        rows, tokens = token_ids.shape
        self._check_dtype(token_ids.device.type)
        if attend is None:
            attend = _choose_attention(documents, cache, rows, tokens)
        elif documents is not None or cache is not None:
            raise InputError("attend excludes documents and cache")
        if positions is None and cache is not None:
            positions = cache.positions(rows, tokens)
        else:
            positions = self._checked_positions(positions, token_ids)
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
        """token_ids [B, T] -> logits [B, T, V] in float32 (float64 in a float64 model); arguments of `features`.

        All B * T * V logits exist at once, 1 MiB per token of the 8B: take `features` and `lm_head` where few
        positions are wanted, and train/loss.py for a loss.
        """
        hidden = self.features(token_ids, positions=positions, documents=documents, cache=cache, observe=observe)
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _check_dtype(self, device_type: str) -> None:
        check_dtype(self.embed_tokens.weight.dtype)
        if torch.is_autocast_enabled(device_type):
            check_dtype(torch.get_autocast_dtype(device_type))

    def _checked_positions(self, positions: Tensor | None, token_ids: Tensor) -> Tensor:
        """The given positions, or 0 .. T - 1; every one of them inside the context."""
        rows, tokens = token_ids.shape
        limit = self.config.max_positions
        if positions is None:
            if tokens > limit:
                raise ContextLengthError(f"{tokens} tokens exceed the context of {limit} positions")
            return torch.arange(tokens, device=token_ids.device)
        if list(positions.shape) not in ([tokens], [rows, tokens]):
            raise InputError(f"positions must be [{tokens}] or [{rows}, {tokens}], got {list(positions.shape)}")
        first, last = (int(edge) for edge in positions.aminmax())
        if first < 0 or last >= limit:
            raise ContextLengthError(f"positions must be in [0, {limit}), got {first} to {last}")
        return staged(positions, token_ids.device)

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

        The defaults are the release's (adept-inference `megatron/model/utils.py`; what its run used is unpublished).

        Args:
            generator: source of the numbers, on the parameters' device.
            std: standard deviation of all matrices but those named next.
            output_std: of the two output projections of a block, `dense` and `dense_4h_to_h`; default
                std / sqrt(2 * num_layers), so that the residual stream grows no faster with depth.
            head_std: of `lm_head`; default std.
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
