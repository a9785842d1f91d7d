"""The paged reference: the same logits to the last bit, whatever else runs and however a prompt was cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.errors import InputError
from persimmon.infer.block_cache import TILE, PagedReference, padded_keys
from persimmon.infer.decoder import Logits
from persimmon.infer.paged import PagedChunk
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_ids, tiny_model

MODEL = tiny_model(hidden_size=64, num_heads=4, max_positions=1200, rotary_base=25_000.0)
BLOCK = 16


def paged(num_blocks: int = 80) -> PagedReference:
    return PagedReference(MODEL, num_blocks, BLOCK)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return tiny_ids(MODEL.config, 1, count, seed)[0].tolist()


def blocks_of(count: int, first: int = 0) -> list[int]:
    return list(range(first, first - (-count // BLOCK)))


def alone(ids: list[int]) -> Logits:
    """Logits of all positions, the sequence by itself and one token at a time."""
    decoder, blocks = paged(), blocks_of(len(ids))
    rows = [decoder.forward([PagedChunk(blocks, i, [token])])[0] for i, token in enumerate(ids)]
    return np.stack([row for row in rows if row is not None])


def test_logits_are_the_models() -> None:
    ids = ids_of(700)
    (logits,) = paged().forward([PagedChunk(blocks_of(700), 0, ids, "all")])
    with torch.inference_mode():
        expected = MODEL(torch.tensor([ids]))[0].numpy()
    assert logits is not None
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_cut_of_a_prompt_changes_no_bit() -> None:
    ids = ids_of(530)
    expected = alone(ids)
    for size in (5, 16, 37, 530):
        decoder, blocks = paged(), blocks_of(530)
        for start in range(0, 530, size):
            part = ids[start : start + size]
            (logits,) = decoder.forward([PagedChunk(blocks, start, part, "all")])
            np.testing.assert_array_equal(logits, expected[start : start + len(part)])


@pytest.mark.slow
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_a_crowd_changes_no_bit(seed: int) -> None:
    """Several sequences of random lengths, cut at random, in random company."""
    dice = random.Random(seed)
    texts = [ids_of(dice.randint(1, 70), n) for n in range(dice.randint(2, 6))]
    tables = [[5 * n + i for i in range(5)] for n in range(len(texts))]
    decoder, done = paged(), [0] * len(texts)
    rows: list[list[Logits]] = [[] for _ in texts]
    while left := [n for n, text in enumerate(texts) if done[n] < len(text)]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        parts = [texts[n][done[n] : done[n] + dice.randint(1, 20)] for n in chosen]
        chunks = [PagedChunk(tables[n], done[n], part, "all") for n, part in zip(chosen, parts, strict=True)]
        for n, part, logits in zip(chosen, parts, decoder.forward(chunks), strict=True):
            assert logits is not None
            rows[n] += list(logits)
            done[n] += len(part)
    for text, got in zip(texts, rows, strict=True):
        np.testing.assert_array_equal(np.stack(got), alone(text))


def test_shared_and_copied_blocks_give_the_same_bits() -> None:
    ids = ids_of(60)
    decoder = paged()
    decoder.forward([PagedChunk([0, 1, 2, 3], 0, ids, "none")])
    decoder.copy_blocks([(3, 9), (9, 7)])
    (logits,) = decoder.forward([PagedChunk([0, 1, 2, 7], 55, ids[55:])])
    np.testing.assert_array_equal(logits, alone(ids)[-1])


def test_calling_again_overwrites() -> None:
    ids = ids_of(40)
    decoder, blocks = paged(), [4, 2, 0]
    decoder.forward([PagedChunk(blocks, 0, ids[:20] + ids_of(15, seed=9), "none")])
    (logits,) = decoder.forward([PagedChunk(blocks, 20, ids[20:])])
    np.testing.assert_array_equal(logits, alone(ids)[-1])


def test_only_wanted_logits_come_back() -> None:
    chunks = [PagedChunk([0], 0, [3, 4], "none"), PagedChunk([1], 0, [3, 4]), PagedChunk([2], 0, [3, 4], "all")]
    none, last, every = paged().forward(chunks)
    assert none is None and last is not None and every is not None
    assert last.shape == (MODEL.config.vocab_size,) and every.shape == (2, MODEL.config.vocab_size)
    np.testing.assert_array_equal(every[-1], last)


def test_zeros_are_counted() -> None:
    decoder = paged()
    assert decoder.active_fraction == []
    decoder.forward([PagedChunk([0], 0, [1, 2, 3])])
    shares: list[float] = []
    with torch.inference_mode():
        MODEL.features(torch.tensor([[1, 2, 3]]), observe=lambda _, x: shares.append(float((x > 0).float().mean())))
    assert decoder.active_fraction == pytest.approx(shares, abs=1e-3)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        paged().forward([PagedChunk([0], 0, [])])
    with pytest.raises(InputError, match="do not fit into 1 blocks"):
        paged().forward([PagedChunk([0], 10, [1] * 7)])
    with pytest.raises(InputError, match="vocabulary"):
        paged().forward([PagedChunk([0], 0, [MODEL.config.vocab_size])])
    with pytest.raises(InputError, match="block_size"):
        PagedReference(MODEL, 4, 12)


def test_the_reference_decoder_offers_it() -> None:
    assert isinstance(ReferenceDecoder(MODEL).paged(4, BLOCK), PagedReference)


def test_padded_keys_grow_in_few_sizes() -> None:
    sizes = [padded_keys(position) for position in range(2048)]
    assert all(size > position for position, size in enumerate(sizes))
    assert sorted(set(sizes)) == [2 * TILE, 64, 128, 256, 512, 1024, 1536, 2048]
