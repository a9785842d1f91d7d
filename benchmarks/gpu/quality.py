"""The whole engine against the reference model in float32, a few layers of the shape: logits, and greedy ids.

The reference is `persimmon.model` with the numbers that the weights stand for, so what is measured is the engine: the
rounding of activations and of the cache, and the order of sums. What quantization itself costs is another question
(`persimmon quantize --report`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from cases import Bench, Case
from torch import Tensor

from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.kernels.matmul import dequantize
from persimmon.fast.cuda.layouts import Matrix
from persimmon.fast.cuda.synthesize import synthesize
from persimmon.fast.cuda.weights import Weights
from persimmon.infer.decoder import Chunk
from persimmon.infer.params import SamplingParams
from persimmon.model import PersimmonModel

LAYERS, VOCABULARY = 4, 32_768
"""Of the model that is compared: its reference in float32 takes 4.3 GiB at the 8B's width."""

MEAN_KL = {"bfloat16": 5e-3, "float32": 1e-6}
"""Nats that the engine's distribution may be away from the reference's, by the type of activations ..."""
LARGEST_ERROR = {"bfloat16": 3e-2, "float32": 1e-3}
"""... and logits, relative to the largest."""

INT8_CACHE = (1e-3, 2e-2)
"""The same two, added where keys and values are int8."""

TIE = 2**-7
"""Of the largest logit: about one unit of bfloat16. Ids may differ where the reference's best logits are closer."""

_PROMPT, _SINGLE = 48, 8


def quality(bench: Bench) -> Iterator[Case]:
    """Logits of every format, greedy ids of plain weights."""
    for name in bench.formats:
        key = {"what": "logits", "format": name, "kv_dtype": bench.kv_dtype(name)}
        yield Case(key, lambda name=name: logits_row(bench, name))
    yield Case({"what": "greedy ids", "format": bench.plain}, lambda: greedy_row(bench))


def small_weights(bench: Bench, name: str) -> Weights:
    """A few layers; nothing else is in memory."""
    bench.drop_weights()
    layers, vocabulary = min(LAYERS, bench.config.num_layers), min(VOCABULARY, bench.config.vocab_size)
    config = bench.config.replace(num_layers=layers, vocab_size=vocabulary, bos_token_id=1, eos_token_id=1)
    return synthesize(config, name, bench.device, bench.active, seed=5)


def logits_row(bench: Bench, name: str) -> dict[str, Any]:
    """A prompt in one pass, then single tokens: errors over all positions."""
    weights, kv_dtype = small_weights(bench, name), bench.kv_dtype(name)
    count = _PROMPT + _SINGLE
    ids = [(3 + 101 * i) % weights.config.vocab_size for i in range(count)]
    decoder = CudaDecoder(weights, cache_tokens=count, kv_dtype=kv_dtype)
    sequence = decoder.new_sequence(count)
    parts = [decoder.forward([Chunk(sequence, ids[:_PROMPT], "all")])[0]]
    parts += [decoder.forward([Chunk(sequence, [token], "all")])[0] for token in ids[_PROMPT:]]
    found = torch.cat([torch.from_numpy(part) for part in parts]).to(bench.device)
    with torch.inference_mode():
        expected = reference(weights)(torch.tensor([ids], device=bench.device))[0]
    activations = str(weights.dtype).removeprefix("torch.")
    more_kl, more_error = INT8_CACHE if kv_dtype == "int8" else (0.0, 0.0)
    return compared(found, expected, MEAN_KL[activations] + more_kl, LARGEST_ERROR[activations] + more_error)


def compared(found: Tensor, expected: Tensor, kl_limit: float, error_limit: float) -> dict[str, Any]:
    """Mean KL and the largest error, each with its limit."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (expected, found))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    error = float((found - expected).abs().max() / expected.abs().max())
    return {
        "positions": len(expected), "mean_kl": kl, "mean_kl_limit": kl_limit, "largest_error": error,
        "largest_error_limit": error_limit, "holds": kl <= kl_limit and error <= error_limit,
    }  # fmt: skip


def greedy_row(bench: Bench) -> dict[str, Any]:
    """Ids drawn on the device, each held to the reference after the same ids."""
    weights, count = small_weights(bench, bench.plain), bench.greedy_tokens
    prompt = [(7 + 53 * i) % weights.config.vocab_size for i in range(16)]
    decoder = CudaDecoder(weights, cache_tokens=len(prompt) + count)
    sequence = decoder.new_sequence(len(prompt) + count)
    decoder.forward([Chunk(sequence, prompt[:-1], "none")])
    drawn = decoder.decode([sequence], prompt[-1:], [SamplingParams(temperature=0.0)], count).token_ids[0].tolist()
    with torch.inference_mode():
        logits = reference(weights)(torch.tensor([prompt + drawn[:-1]], device=bench.device))[0, len(prompt) - 1 :]
    return tie_rule(logits, torch.tensor(drawn, device=bench.device))


def tie_rule(logits: Tensor, drawn: Tensor) -> dict[str, Any]:
    """How many of the ids [T] are not the reference's best by its logits [T, V], and whether each is a tie."""
    best = logits.max(-1).values
    gaps = best - logits.gather(-1, drawn.long()[:, None])[:, 0]
    bounds = TIE * logits.abs().amax(-1)
    return {
        "ids": len(drawn), "other_ids": int((gaps > 0).sum()), "largest_gap": float(gaps.max()),
        "tie_bound": float(bounds.min()), "holds": bool((gaps <= bounds).all()),
    }  # fmt: skip


def reference(weights: Weights) -> PersimmonModel:
    """The reference model in float32 with the numbers that the weights stand for."""
    with torch.device("meta"):
        model = PersimmonModel(weights.config)
    model.load_state_dict(numbers(weights), assign=True)
    return model.eval()


def numbers(weights: Weights) -> dict[str, Tensor]:
    """By the model's names."""

    def full(matrix: Matrix) -> Tensor:
        stored = dequantize(matrix, torch.float32).float()
        return (stored.T if matrix.neuron_major else stored).contiguous()

    found = {
        "embed_tokens.weight": weights.embedding.float(), "lm_head.weight": full(weights.head),
        "final_layernorm.weight": weights.final_norm.weight, "final_layernorm.bias": weights.final_norm.bias,
    }  # fmt: skip
    for index, layer in enumerate(weights.layers):
        prefix = f"layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        found |= {
            attention + "query_key_value.weight": full(layer.query_key_value),
            attention + "query_key_value.bias": layer.query_key_value_bias,
            attention + "dense.weight": full(layer.dense), attention + "dense.bias": layer.dense_bias,
            mlp + "dense_h_to_4h.weight": full(layer.up), mlp + "dense_h_to_4h.bias": layer.up_bias,
            mlp + "dense_4h_to_h.weight": full(layer.down), mlp + "dense_4h_to_h.bias": layer.down_bias,
            prefix + "input_layernorm.weight": layer.input_norm.weight,
            prefix + "input_layernorm.bias": layer.input_norm.bias,
            prefix + "post_attention_layernorm.weight": layer.post_norm.weight,
            prefix + "post_attention_layernorm.bias": layer.post_norm.bias,
        }  # fmt: skip
        if layer.qk_norms is not None:
            names = [f"{attention}{which}_layernorm.{part}" for which in "qk" for part in ("weight", "bias")]
            found |= dict(zip(names, layer.qk_norms, strict=True))
    return found
