"""256 greedy tokens equal those of transformers' PersimmonForCausalLM in float32, with and without its cache."""

from __future__ import annotations

import pytest
import torch

from persimmon.infer.generate import Stream
from persimmon.infer.params import SamplingParams
from persimmon.infer.reference import ReferenceDecoder
from persimmon.model import PersimmonModel
from tiny_model import tiny_ids, tiny_model
from tiny_tokenizer import tiny_tokenizer

transformers = pytest.importorskip("transformers")

NUM_TOKENS = 256


def peer_of(model: PersimmonModel) -> torch.nn.Module:
    """The same weights in transformers' model; `to_hub` writes relu2 and every rope parameter out."""
    settings = model.config.to_hub(dtype="float32")
    settings.pop("model_type")
    peer = transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**settings)).float().eval()
    weights = {("" if name == "lm_head.weight" else "model.") + name: w for name, w in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    return peer


def ours(model: PersimmonModel, prompt: list[int]) -> list[int]:
    """Through the whole of our generation; end-of-text is biased away, as nothing may end early."""
    tokenizer = tiny_tokenizer()
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logit_bias={tokenizer.eos_id: -100.0})
    stream = Stream(ReferenceDecoder(model), tokenizer, prompt, params)
    for _ in stream:
        pass
    return stream.result().token_ids


@torch.inference_mode()
def theirs(peer: torch.nn.Module, prompt: list[int], *, cached: bool) -> list[int]:
    """A plain greedy loop over the peer's forward, with the ids that we never emit excluded."""
    tokenizer = tiny_tokenizer()
    ids, cache = list(prompt), None
    for _ in range(NUM_TOKENS):
        new = ids if cache is None else ids[-1:]
        result = peer(torch.tensor([new]), past_key_values=cache, use_cache=cached)
        cache = result.past_key_values if cached else None
        scores = result.logits[0, -1].float()
        scores[list(tokenizer.special_ids)] = float("-inf")
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"num_heads": 1}),
        (2, {"partial_rotary_factor": 1.0, "num_layers": 3}),
        (3, {"hidden_size": 48, "num_heads": 3, "partial_rotary_factor": 0.25}),
    ],
)
def test_the_same_256_greedy_tokens(seed: int, changes: dict[str, object]) -> None:
    model = tiny_model(seed, **changes)
    peer = peer_of(model)
    prompt = tiny_ids(model.config, 1, 17, seed)[0].tolist()
    generated = ours(model, prompt)
    assert len(generated) == NUM_TOKENS and len(set(generated)) > 3
    assert generated == theirs(peer, prompt, cached=True)
    assert generated == theirs(peer, prompt, cached=False)
