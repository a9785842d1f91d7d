"""What the engine is compared with: the same model in plain PyTorch, compiled and captured, and transformers' own.

Dense bfloat16 decoding with a static cache, one compiled function per layer kind, the whole step in a CUDA graph: what
a careful user of torch.compile gets without kernels of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from persimmon.bench.gpu_kernels import seconds_of
from persimmon.config import ModelConfig
from persimmon.fast.cuda.weights import Layer, Weights
from persimmon.model import apply_rotary


class PlainDecoder:
    """Decodes `batch` rows from a context that is full already; plain weights only."""

    def __init__(self, weights: Weights, batch: int, context: int, *, compiled: bool) -> None:
        config, device, dtype = weights.config, weights.device, weights.dtype
        self._weights = weights
        self._step = torch.compile(plain_layer, dynamic=False) if compiled else plain_layer
        shape = (batch, config.num_heads, context, config.head_dim)
        self._cache = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]
        self._vectors = [
            [t.to(dtype) for t in (la.query_key_value_bias, la.dense_bias, la.up_bias, la.down_bias)]
            for la in weights.layers
        ]
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.full((1,), context - 1, dtype=torch.int64, device=device)

    def step(self) -> None:
        """One token further, greedily."""
        weights = self._weights
        x = weights.embedding[self.ids].float()
        cos, sin = (t[self.position] for t in weights.rotary)
        for layer, cache, vectors in zip(weights.layers, self._cache, self._vectors, strict=True):
            x = self._step(x, layer, cache, vectors, cos, sin, self.position, weights.config)
        norm, eps = weights.final_norm, weights.config.layer_norm_eps
        hidden = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps).to(weights.dtype)
        self.ids.copy_(F.linear(hidden, weights.head.codes).argmax(-1))


def plain_layer(
    x: Tensor, layer: Layer, cache: tuple[Tensor, Tensor], biases: list[Tensor], cos: Tensor, sin: Tensor,
    position: Tensor, config: ModelConfig,
) -> Tensor:  # fmt: skip
    """One layer for one new token per row: x [B, H] float32."""
    heads, dim, eps = config.num_heads, config.head_dim, config.layer_norm_eps
    dtype = biases[0].dtype
    normed = F.layer_norm(x, x.shape[-1:], layer.input_norm.weight, layer.input_norm.bias, eps).to(dtype)
    q, k, v = F.linear(normed, layer.query_key_value.codes, biases[0]).view(-1, 1, heads, 3, dim).unbind(3)
    if layer.qk_norms is not None:
        q_weight, q_bias, k_weight, k_bias = layer.qk_norms
        q = F.layer_norm(q.float(), (dim,), q_weight, q_bias, eps).to(dtype)
        k = F.layer_norm(k.float(), (dim,), k_weight, k_bias, eps).to(dtype)
    turn = (cos[:, None, None], sin[:, None, None])
    q, k = apply_rotary(q, *turn), apply_rotary(k, *turn)
    keys, values = cache
    keys.index_copy_(2, position, k.transpose(1, 2))
    values.index_copy_(2, position, v.transpose(1, 2))
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
    x = x + F.linear(attended.transpose(1, 2).reshape(x.shape), layer.dense.codes, biases[1]).float()
    normed = F.layer_norm(x, x.shape[-1:], layer.post_norm.weight, layer.post_norm.bias, eps).to(dtype)
    active = F.linear(normed, layer.up.codes, biases[2]).relu().square()
    return x + (active @ layer.down.codes + biases[3]).float()


def transformers_tokens_per_second(config: ModelConfig, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Greedy `generate` of transformers' PersimmonForCausalLM at batch 1, random weights, an 8-token prompt."""
    from transformers import PersimmonConfig, PersimmonForCausalLM

    fields = {k: v for k, v in config.to_hub().items() if k not in ("architectures", "model_type", "torch_dtype")}
    with torch.device("meta"):
        model = PersimmonForCausalLM(PersimmonConfig(**fields)).to(dtype)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers were on meta
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)

    def generate(count: int) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip

    with torch.inference_mode():
        generate(2)
        return tokens / seconds_of(lambda: generate(tokens), device)
