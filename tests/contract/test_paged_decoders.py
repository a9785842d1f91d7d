"""What every paged decoder must do: the same logits, whatever else runs and however a text was cut.

To the last bit on the CPU. On the GPU the number of tokens of a call chooses between kernels, which add the same
numbers in another order; those tests are kept short, for kernels in an interpreter take a tenth of a second per step.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpu_decoders import cpu_decoder
from cuda_decoders import cuda_decoder
from persimmon.errors import InputError, UnavailableError
from persimmon.infer.block_cache import PagedReference
from persimmon.infer.decoder import Chunk, Decoder, Logits
from persimmon.infer.paged import PagedChunk, PagedDecoder, page
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_ids, tiny_model

MODEL = tiny_model(hidden_size=64, num_heads=4, max_positions=1200, rotary_base=25_000.0)
BLOCK = 16

DECODERS: dict[str, Callable[[], Decoder]] = {
    "reference": lambda: ReferenceDecoder(MODEL),
    "cpu": lambda: cpu_decoder(MODEL),
    "cpu, int8 keys and values, 3 threads": lambda: cpu_decoder(MODEL, kv_dtype="int8", threads=3),
    "cuda": lambda: cuda_decoder(MODEL, cache_tokens=128),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order, logits near 10


@pytest.fixture(params=DECODERS, scope="module")
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return DECODERS[request.param]()


def paged(decoder: Decoder, num_blocks: int = 80) -> PagedDecoder:
    found = page(decoder, num_blocks, BLOCK, max_sequences=1)
    assert found.shares_blocks and (found.num_blocks, found.block_size) == (num_blocks, BLOCK)
    return found


def ids_of(count: int, seed: int = 0) -> list[int]:
    return tiny_ids(MODEL.config, 1, count, seed)[0].tolist()


def blocks_of(count: int, first: int = 0) -> list[int]:
    return list(range(first, first - (-count // BLOCK)))


def alone(decoder: Decoder, ids: list[int]) -> Logits:
    """Logits of all positions, the sequence by itself and one token at a time (cuda: in one call).

    The cpu engine's are those of a sequence with a cache of its own; the reference's two caches may differ in bits.
    """
    if isinstance(decoder, ReferenceDecoder):
        blocks, own = blocks_of(len(ids)), paged(decoder)
        rows = [own.forward([PagedChunk(blocks, i, [token])])[0] for i, token in enumerate(ids)]
    else:
        sequence = decoder.new_sequence(len(ids))
        if decoder.name == "cuda":
            (every,) = decoder.forward([Chunk(sequence, ids, "all")])
            assert every is not None
            return every
        rows = [decoder.forward([Chunk(sequence, [token])])[0] for token in ids]
        sequence.close()
    return np.stack([row for row in rows if row is not None])


def same(decoder: Decoder, got: Logits | None, expected: Logits) -> None:
    assert got is not None
    if decoder.name == "cuda":
        np.testing.assert_allclose(got, expected, **TOLERANCE)
    else:
        np.testing.assert_array_equal(got, expected)


def size_for(decoder: Decoder, many: int, few: int) -> int:
    """Tokens of a test, fewer where an interpreter runs the kernels."""
    return few if decoder.name == "cuda" else many


def test_logits_are_the_models(decoder: Decoder) -> None:
    if "int8" in getattr(decoder, "kv_dtype", ""):
        pytest.skip("int8 keys and values are close to the model's, not equal")
    ids = ids_of(size_for(decoder, 700, 100))
    (logits,) = paged(decoder).forward([PagedChunk(blocks_of(len(ids)), 0, ids, "all")])
    with torch.inference_mode():
        expected = MODEL(torch.tensor([ids]))[0].numpy()
    assert logits is not None
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_cut_of_a_prompt_changes_no_bit(decoder: Decoder) -> None:
    count = size_for(decoder, 530, 40)
    ids = ids_of(count)
    expected = alone(decoder, ids)
    for size in (5, 16, 37, count):
        cache, blocks = paged(decoder), blocks_of(count)
        for start in range(0, count, size):
            part = ids[start : start + size]
            (logits,) = cache.forward([PagedChunk(blocks, start, part, "all")])
            same(decoder, logits, expected[start : start + len(part)])


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_a_crowd_changes_no_bit(decoder: Decoder, seed: int) -> None:
    """Several sequences of random lengths, cut at random, in random company."""
    if decoder.name == "cuda" and seed > 0:
        return  # the first example alone
    dice, longest = random.Random(seed), size_for(decoder, 70, 12)
    texts = [ids_of(dice.randint(1, longest), n) for n in range(dice.randint(2, 6))]
    tables = [[5 * n + i for i in range(5)] for n in range(len(texts))]
    cache, done = paged(decoder), [0] * len(texts)
    rows: list[list[Logits]] = [[] for _ in texts]
    while left := [n for n, text in enumerate(texts) if done[n] < len(text)]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        parts = [texts[n][done[n] : done[n] + dice.randint(1, 20)] for n in chosen]
        chunks = [PagedChunk(tables[n], done[n], part, "all") for n, part in zip(chosen, parts, strict=True)]
        for n, part, logits in zip(chosen, parts, cache.forward(chunks), strict=True):
            assert logits is not None
            rows[n] += list(logits)
            done[n] += len(part)
    for text, got in zip(texts, rows, strict=True):
        same(decoder, np.stack(got), alone(decoder, text))


def test_shared_and_copied_blocks_give_the_same_bits(decoder: Decoder) -> None:
    ids = ids_of(60)
    cache = paged(decoder)
    cache.forward([PagedChunk([0, 1, 2, 3], 0, ids, "none")])
    cache.copy_blocks([(3, 9), (9, 7)])
    (logits,) = cache.forward([PagedChunk([0, 1, 2, 7], 55, ids[55:])])
    same(decoder, logits, alone(decoder, ids)[-1])


def test_calling_again_overwrites(decoder: Decoder) -> None:
    ids = ids_of(40)
    cache, blocks = paged(decoder), [4, 2, 0]
    cache.forward([PagedChunk(blocks, 0, ids[:20] + ids_of(15, seed=9), "none")])
    (logits,) = cache.forward([PagedChunk(blocks, 20, ids[20:])])
    same(decoder, logits, alone(decoder, ids)[-1])


def test_only_wanted_logits_come_back(decoder: Decoder) -> None:
    chunks = [PagedChunk([0], 0, [3, 4], "none"), PagedChunk([1], 0, [3, 4]), PagedChunk([2], 0, [3, 4], "all")]
    none, last, every = paged(decoder).forward(chunks)
    assert none is None and last is not None and every is not None
    assert last.shape == (MODEL.config.vocab_size,) and every.shape == (2, MODEL.config.vocab_size)
    np.testing.assert_array_equal(every[-1], last)


def test_zeros_are_counted(decoder: Decoder) -> None:
    if decoder.name == "cuda":
        pytest.skip("the cuda engine counts no zeros: that would cost a round trip to the host")
    fresh = paged(DECODERS["reference"]() if isinstance(decoder, ReferenceDecoder) else cpu_decoder(MODEL))
    assert fresh.active_fraction == []
    fresh.forward([PagedChunk([0], 0, [1, 2, 3])])
    shares: list[float] = []
    with torch.inference_mode():
        MODEL.features(torch.tensor([[1, 2, 3]]), observe=lambda _, x: shares.append(float((x > 0).float().mean())))
    assert fresh.active_fraction == pytest.approx(shares, abs=1e-3)


def test_wrong_calls_are_refused(decoder: Decoder) -> None:
    cache = paged(decoder)
    assert cache.forward([]) == []
    for chunk, message in (
        (PagedChunk([0], 0, []), "no tokens"),
        (PagedChunk([0], 10, [1] * 7), "do not fit into 1 blocks"),
        (PagedChunk(list(range(80)), 1199, [1, 2]), "do not fit"),
        (PagedChunk([0], 0, [MODEL.config.vocab_size]), "vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            cache.forward([chunk])
    with pytest.raises(InputError, match="block_size"):
        page(decoder, 4, 0 if decoder.name == "cuda" else 12, max_sequences=1)  # the GPU takes blocks of any size


def test_blocks_that_are_not_there_are_refused() -> None:
    cache = paged(cpu_decoder(MODEL), 4)
    for table in ([4], [-1], [0, 9]):
        with pytest.raises(IndexError, match="no such block"):
            cache.forward([PagedChunk(table, 0, [1])])
    with pytest.raises(ValueError, match="no such block"):
        cache.copy_blocks([(0, 4)])


def test_a_token_takes_what_it_says(decoder: Decoder) -> None:
    per_head = {"float32": 4 * 16, "int8": 16 + 4}[getattr(decoder, "kv_dtype", "float32")]
    assert decoder.token_bytes == 2 * MODEL.config.num_layers * 4 * per_head


def test_blocks_beyond_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = cpu_decoder(MODEL)
    monkeypatch.setattr("persimmon.fast.cpu.decoder.memory_available", lambda: 1 << 20)
    with pytest.raises(UnavailableError, match="keys and values of 16000 tokens need"):
        decoder.paged(1000, BLOCK)


def test_the_reference_decoder_offers_it() -> None:
    assert isinstance(ReferenceDecoder(MODEL).paged(4, BLOCK), PagedReference)
