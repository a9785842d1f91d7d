"""What every decoder must do, whatever its engine. A new engine joins by one line in DECODERS."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_decoders import cpu_decoder
from cuda_decoders import SPARSE, cuda_decoder
from persimmon.errors import ContextLengthError, InputError
from persimmon.infer.decoder import Chunk, Decoder
from persimmon.infer.reference import ReferenceDecoder
from persimmon.model import PersimmonModel
from tiny_model import tiny_model

DECODERS: dict[str, Callable[[PersimmonModel], Decoder]] = {
    "reference": ReferenceDecoder,
    "cpu": cpu_decoder,
    "cuda": cuda_decoder,
}
# The same with settings that make its inner cuts fall everywhere.
VARIANTS = DECODERS | {
    "reference, 7 tokens per step": lambda model: ReferenceDecoder(model, max_step_tokens=7),
    "cpu, 3 threads, portable": lambda model: cpu_decoder(model, threads=3, isa="portable"),
    "cuda, 7 tokens per pass, sparse": lambda model: cuda_decoder(model, max_pass_tokens=7, table=SPARSE),
}

# float32 sums in another order: a few units in the last place of logits near 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

MODEL = tiny_model()


# Kernels in an interpreter take a tenth of a second per step: they get chosen examples instead of many random ones.
QUICK = [name for name in VARIANTS if "cuda" not in name]
INTERPRETED = [name for name in VARIANTS if "cuda" in name]


@pytest.fixture(params=VARIANTS, scope="module")
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return VARIANTS[request.param](MODEL)


@pytest.fixture(params=QUICK, scope="module")
def quick_decoder(request: pytest.FixtureRequest) -> Decoder:
    return VARIANTS[request.param](MODEL)


@pytest.fixture(params=INTERPRETED, scope="module")
def interpreted_decoder(request: pytest.FixtureRequest) -> Decoder:
    return VARIANTS[request.param](MODEL)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, MODEL.config.vocab_size, count).tolist()


def model_logits(ids: list[int]) -> np.ndarray:
    """The model's own forward over the whole sequence, without a cache."""
    with torch.inference_mode():
        return MODEL(torch.tensor([ids]))[0].numpy()


def last_logits(ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return MODEL.lm_head(MODEL.features(torch.tensor([ids]))[:, -1])[0].numpy()


def run(decoder: Decoder, ids: list[int]) -> np.ndarray:
    sequence = decoder.new_sequence(len(ids))
    (logits,) = decoder.forward([Chunk(sequence, ids, "all")])
    return logits


def test_names_and_config(decoder: Decoder) -> None:
    assert decoder.name in ("reference", "cpu", "cuda")
    assert decoder.config == MODEL.config


def test_all_logits_equal_the_models(decoder: Decoder) -> None:
    ids = some_ids(40)
    logits = run(decoder, ids)
    assert logits.dtype == np.float32 and logits.shape == (40, MODEL.config.vocab_size)
    np.testing.assert_allclose(logits, model_logits(ids), **TOLERANCE)


def test_what_is_asked_for_comes_back(decoder: Decoder) -> None:
    ids = some_ids(12)
    full = model_logits(ids)
    for wanted, expected in (("none", None), ("last", full[-1]), ("all", full)):
        (logits,) = decoder.forward([Chunk(decoder.new_sequence(12), ids, wanted)])
        if expected is None:
            assert logits is None
        else:
            assert logits.shape == expected.shape
            np.testing.assert_allclose(logits, expected, **TOLERANCE)


def check_chunking(decoder: Decoder, cuts: set[int]) -> None:
    ids = some_ids(40)
    sequence = decoder.new_sequence(40)
    edges = [0, *sorted(cuts), 40]
    parts = [decoder.forward([Chunk(sequence, ids[start:end], "all")])[0] for start, end in itertools.pairwise(edges)]
    assert sequence.length == 40
    np.testing.assert_allclose(np.concatenate(parts), model_logits(ids), **TOLERANCE)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 39), max_size=12))
def test_any_chunking_gives_the_same_logits(quick_decoder: Decoder, cuts: set[int]) -> None:
    check_chunking(quick_decoder, cuts)


@pytest.mark.parametrize("cuts", [{1, 2, 19}, {17, 18, 39}], ids=str)
def test_chosen_chunkings_give_the_same_logits(interpreted_decoder: Decoder, cuts: set[int]) -> None:
    check_chunking(interpreted_decoder, cuts)


def check_ragged(decoder: Decoder, lengths: list[int], size: Callable[[int, int], int]) -> None:
    """Sequences of these lengths, each advanced by `size(sequence, tokens left)` in every call."""
    ids = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    sequences = [decoder.new_sequence(length) for length in lengths]
    done = [0] * len(lengths)
    collected: list[list[np.ndarray]] = [[] for _ in lengths]
    while any(done[i] < len(ids[i]) for i in range(len(lengths))):
        active = [i for i in range(len(lengths)) if done[i] < len(ids[i])]
        sizes = [size(i, len(ids[i]) - done[i]) for i in active]
        chunks = [Chunk(sequences[i], ids[i][done[i] : done[i] + n], "all") for i, n in zip(active, sizes, strict=True)]
        for i, n, logits in zip(active, sizes, decoder.forward(chunks), strict=True):
            collected[i].append(logits)
            done[i] += n
    for row, parts in zip(ids, collected, strict=True):
        np.testing.assert_allclose(np.concatenate(parts), model_logits(row), **TOLERANCE)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_sequences_in_one_call_equal_each_alone(quick_decoder: Decoder, data: st.DataObject) -> None:
    """Ragged batches of any mix of prefill and decode."""
    lengths = data.draw(st.lists(st.integers(2, 30), min_size=1, max_size=4))
    check_ragged(quick_decoder, lengths, lambda _, left: data.draw(st.integers(1, left)))


def test_a_ragged_batch_equals_each_alone(interpreted_decoder: Decoder) -> None:
    """A long prompt, a short one and single tokens; then three single tokens, padded to a batch of four."""
    pieces = {0: [20, 1, 9], 1: [5, 1, 1], 2: [1, 1, 1]}
    check_ragged(interpreted_decoder, [30, 7, 3], lambda i, _: pieces[i].pop(0))


def test_mixed_wishes_in_one_call(decoder: Decoder) -> None:
    ids = [some_ids(9, seed) for seed in range(3)]
    chunks = [
        Chunk(decoder.new_sequence(9), row, wanted) for row, wanted in zip(ids, ("all", "none", "last"), strict=True)
    ]
    every, nothing, last = decoder.forward(chunks)
    assert nothing is None
    np.testing.assert_allclose(every, model_logits(ids[0]), **TOLERANCE)
    np.testing.assert_allclose(last, model_logits(ids[2])[-1], **TOLERANCE)


def test_truncate_goes_back_in_time(decoder: Decoder) -> None:
    ids = some_ids(30)
    sequence = decoder.new_sequence(40)
    decoder.forward([Chunk(sequence, some_ids(5, seed=9), "none")])
    sequence.truncate(0)
    decoder.forward([Chunk(sequence, ids[:20] + some_ids(10, seed=8), "none")])
    sequence.truncate(20)
    assert sequence.length == 20
    (logits,) = decoder.forward([Chunk(sequence, ids[20:])])
    np.testing.assert_allclose(logits, model_logits(ids)[-1], **TOLERANCE)
    for length in (-1, 31):
        with pytest.raises(InputError, match="truncate"):
            sequence.truncate(length)


def test_exact_top_keeps_the_largest_exact(decoder: Decoder) -> None:
    ids = some_ids(15)
    exact = model_logits(ids)[-1]
    (logits,) = decoder.forward([Chunk(decoder.new_sequence(15), ids)], exact_top=5)
    best = np.argsort(-exact)[:5]
    np.testing.assert_allclose(logits[best], exact[best], **TOLERANCE)
    assert np.all(np.isneginf(logits) | np.isclose(logits, exact, **TOLERANCE))


def test_a_chunk_that_does_not_fit_changes_nothing(decoder: Decoder) -> None:
    ids = some_ids(11)
    full, other = decoder.new_sequence(10), decoder.new_sequence(10)
    decoder.forward([Chunk(full, ids[:6], "none")])
    with pytest.raises(ContextLengthError, match="5 more tokens do not fit: 6 of 10"):
        decoder.forward([Chunk(other, ids[:3]), Chunk(full, ids[6:11])])
    assert (full.length, other.length) == (6, 0)
    (logits,) = decoder.forward([Chunk(full, ids[6:10])])
    assert full.length == full.capacity == 10
    np.testing.assert_allclose(logits, model_logits(ids[:10])[-1], **TOLERANCE)


@pytest.mark.parametrize("capacity", [0, -1, 16_385])
def test_impossible_capacities_are_refused(decoder: Decoder, capacity: int) -> None:
    with pytest.raises(ContextLengthError, match="16384"):
        decoder.new_sequence(capacity)


def test_bad_chunks_are_refused(decoder: Decoder) -> None:
    sequence = decoder.new_sequence(10)
    for ids, message in (([], "no tokens"), ([3, 320], "320"), ([-1, 3], "-1")):
        with pytest.raises(InputError, match=message):
            decoder.forward([Chunk(sequence, ids)])
    with pytest.raises(InputError, match="twice"):
        decoder.forward([Chunk(sequence, [1]), Chunk(sequence, [2])])
    assert sequence.length == 0
    sequence.close()
    with pytest.raises(InputError, match="closed"):
        decoder.forward([Chunk(sequence, [1])])


def test_no_chunks_no_results(decoder: Decoder) -> None:
    assert decoder.forward([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_every_position_of_the_context_is_usable(name: str) -> None:
    """16,384 tokens: the last logits equal those of one uncached pass, and not one token more fits."""
    decoder = DECODERS[name](MODEL)
    length = MODEL.config.max_positions
    ids = some_ids(length)
    sequence = decoder.new_sequence(length)
    decoder.forward([Chunk(sequence, ids[:-1], "none")])
    (logits,) = decoder.forward([Chunk(sequence, ids[-1:])])
    np.testing.assert_allclose(logits, last_logits(ids), **TOLERANCE)
    with pytest.raises(ContextLengthError, match="16384 of 16384"):
        decoder.forward([Chunk(sequence, [1])])
