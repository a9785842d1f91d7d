"""What only the reference's cache and decoder promise; the rest is in tests/contract/test_decoders.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persimmon.errors import InputError
from persimmon.infer.decoder import Chunk
from persimmon.infer.kv_cache import KVCache
from persimmon.infer.reference import ReferenceDecoder
from scripted_decoder import ScriptedSequence
from tiny_model import tiny_config, tiny_ids, tiny_model

CONFIG = tiny_config()
BYTES_PER_TOKEN = 2 * CONFIG.num_layers * CONFIG.hidden_size * 4


def test_memory_grows_by_doubling_up_to_the_capacity() -> None:
    cache = KVCache(CONFIG, 1000, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.num_bytes == 0
    sizes = []
    for _ in range(1000):
        cache.reserve(1)
        cache.length += 1
        sizes.append(cache.num_bytes // BYTES_PER_TOKEN)
    assert sorted(set(sizes)) == [256, 512, 1000]
    cache.truncate(3)
    assert cache.num_bytes // BYTES_PER_TOKEN == 1000  # kept for what comes next
    cache.close()
    assert cache.num_bytes == 0


def test_growing_keeps_what_is_stored() -> None:
    decoder = ReferenceDecoder(tiny_model())
    ids = tiny_ids(CONFIG, 1, 600)[0].tolist()
    sequence = decoder.new_sequence(600)
    for start in range(0, 600, 100):
        (logits,) = decoder.forward([Chunk(sequence, ids[start : start + 100])])
    with torch.inference_mode():
        expected = decoder.model(torch.tensor([ids]))[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_interrupt_while_it_grows_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ReferenceDecoder(tiny_model())
    ids = tiny_ids(CONFIG, 1, 300)[0].tolist()
    sequence = decoder.new_sequence(300)
    decoder.forward([Chunk(sequence, ids[:200], "none")])
    grow, calls = KVCache._grown, []

    def interrupted(cache: KVCache, store: torch.Tensor, needed: int) -> torch.Tensor:
        calls.append(needed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return grow(cache, store, needed)

    monkeypatch.setattr(KVCache, "_grown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.forward([Chunk(sequence, ids[200:])])
    (logits,) = decoder.forward([Chunk(sequence, ids[200:])])
    with torch.inference_mode():
        expected = decoder.model(torch.tensor([ids]))[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_sequence_of_another_decoder_is_refused() -> None:
    decoder = ReferenceDecoder(tiny_model())
    with pytest.raises(InputError, match="another decoder: ScriptedSequence"):
        decoder.forward([Chunk(ScriptedSequence(10), [1])])


def test_bfloat16_keeps_its_cache_in_bfloat16_and_gives_float32_logits() -> None:
    """Chunking may move a bfloat16 result by its rounding: 2^-8 of logits of a few units, over two layers."""
    decoder = ReferenceDecoder(tiny_model().to(torch.bfloat16))
    ids = tiny_ids(CONFIG, 1, 40)[0].tolist()
    sequence = decoder.new_sequence(40)
    parts = [decoder.forward([Chunk(sequence, ids[i : i + 8], "all")])[0] for i in range(0, 40, 8)]
    assert sequence.num_bytes == 40 * BYTES_PER_TOKEN // 2
    with torch.inference_mode():
        whole = decoder.model(torch.tensor([ids]))[0].numpy()
    assert parts[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=0.25)
