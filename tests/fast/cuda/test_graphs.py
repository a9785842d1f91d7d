"""Captured steps with a stand-in for CUDA graphs: what is captured when, and that replays see the buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import triton_interpreter  # skips without triton
from cuda_decoders import cuda_decoder
from persimmon.errors import InputError
from persimmon.fast.cuda import pool
from persimmon.fast.cuda.buffers import Tables
from persimmon.fast.cuda.decoder import BLOCK_SIZE
from persimmon.fast.cuda.graphs import BUCKETS, Replay, Step, StepGraphs, bucket_for
from persimmon.fast.cuda.runner import Piece, _Part
from persimmon.infer.decoder import Chunk
from persimmon.infer.drawing import Draw
from persimmon.infer.params import SamplingParams
from tiny_model import tiny_model

MODEL = tiny_model()


class FakeGraphs:
    """Runs a step twice to warm up and once to record, as CUDA does; a replay runs it again and is counted."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, step: Step) -> Replay:
        self.captures += 1
        for _ in range(3):
            step()

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def greedy(ids: list[int], count: int) -> list[int]:
    """The reference's greedy continuation."""
    row = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            row.append(int(MODEL(torch.tensor([row]))[0, -1].argmax()))
    return row[len(ids) :]


def test_buckets() -> None:
    assert [bucket_for(n) for n in (1, 3, 9, 33, 64)] == [1, 4, 12, 48, 64]
    assert list(BUCKETS) == sorted(BUCKETS)


def test_a_step_is_prepared_once() -> None:
    fake, ran = FakeGraphs(), []
    graphs = StepGraphs(fake.capture)
    for _ in range(2):
        graphs.prepare("a", lambda: ran.append("a"))
    assert "a" in graphs and "b" not in graphs and fake.captures == 1 and len(ran) == 3
    graphs.replay("a")
    assert fake.replays == 1 and len(ran) == 4
    plain = StepGraphs(None)
    plain.prepare("a", lambda: ran.append("plain"))
    assert "plain" not in ran
    plain.replay("a")
    assert ran[-1] == "plain"


def test_warming_up_harms_no_sequence() -> None:
    """A second batch size is captured while sequences have keys and values: logits stay the reference's."""
    fake = FakeGraphs()
    decoder = cuda_decoder(MODEL, cache_tokens=512, capture=fake.capture)
    first, second = decoder.new_sequence(64), decoder.new_sequence(64)
    ids = [5, 9, 11, 200]
    decoder.forward([Chunk(first, ids[:3], "none")])
    assert fake.captures == 0
    decoder.forward([Chunk(first, ids[3:], "none")])
    decoder.forward([Chunk(second, [7], "none")])
    assert (fake.captures, fake.replays) == (1, 2)
    one, two = decoder.forward([Chunk(first, [3]), Chunk(second, [8])])
    assert (fake.captures, fake.replays) == (2, 3)
    with torch.inference_mode():
        np.testing.assert_allclose(one, MODEL(torch.tensor([[*ids, 3]]))[0, -1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(two, MODEL(torch.tensor([[7, 8]]))[0, -1], rtol=1e-4, atol=1e-4)


def test_decoding_on_the_device_is_greedy_decoding() -> None:
    """Three rows in a batch of four, six tokens without the host, then on from there."""
    fake = FakeGraphs()
    decoder = cuda_decoder(MODEL, cache_tokens=512, capture=fake.capture)
    prompts = [[5, 9, 11], [200, 3], [77]]
    sequences = [decoder.new_sequence(64) for _ in prompts]
    decoder.forward([Chunk(s, p[:-1], "none") for s, p in zip(sequences, prompts, strict=True) if len(p) > 1])
    params = [SamplingParams(temperature=0.0)] * 3
    drawn = decoder.decode(sequences, [p[-1] for p in prompts], params, 6)
    expected = [greedy(prompt, 9) for prompt in prompts]
    assert drawn.token_ids.tolist() == [row[:6] for row in expected]
    assert [s.length for s in sequences] == [len(p) - 1 + 6 for p in prompts]
    captures = fake.captures
    more = decoder.decode(sequences, drawn.token_ids[:, -1].tolist(), params, 3)
    assert more.token_ids.tolist() == [row[6:] for row in expected]
    assert fake.captures == captures and not more.truncated.any()


def test_draws_are_the_same_alone_and_in_a_crowd_and_respect_bans() -> None:
    decoder = cuda_decoder(MODEL, cache_tokens=1024)
    params = [SamplingParams(temperature=1.0, seed=s, top_k=k) for s, k in ((1, 0), (2, 5))]

    def run(rows: list[int]) -> list[list[int]]:
        sequences = [decoder.new_sequence(32) for _ in rows]
        banned = list(range(0, 320, 2))
        return decoder.decode(sequences, [3] * len(rows), [params[i] for i in rows], 5, banned).token_ids.tolist()

    both = run([0, 1])
    assert [run([0])[0], run([1])[0]] == both
    assert all(token % 2 == 1 for row in both for token in row)
    assert both[0] != both[1]


@pytest.mark.parametrize("count", [0, 1025])
def test_impossible_numbers_of_tokens_are_refused(count: int) -> None:
    decoder = cuda_decoder(MODEL, cache_tokens=512)
    with pytest.raises(ValueError, match="num_tokens must be from 1 to 1024"):
        decoder.decode([decoder.new_sequence(8)], [1], [SamplingParams()], count)


def test_padding_rows_stay_in_the_scratch_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in a bucket of four, more steps than a block has slots: nothing lands behind the pool."""
    guard, caches = 256, []
    make = pool._layer

    def guarded(shape: tuple[int, int, int], kv_dtype: str, device: torch.device) -> pool.LayerCache:
        whole = make((shape[0] + guard, *shape[1:]), kv_dtype, device)
        caches.append((whole, shape[0]))
        return pool.LayerCache(whole.keys[: shape[0]], whole.values[: shape[0]], None)

    monkeypatch.setattr(pool, "_layer", guarded)
    decoder = cuda_decoder(MODEL, cache_tokens=512)
    sequences = [decoder.new_sequence(128) for _ in range(3)]
    drawn = decoder.decode(sequences, [3, 4, 5], [SamplingParams(temperature=0.0)] * 3, BLOCK_SIZE + 6)
    assert drawn.token_ids[:, :4].tolist() == [greedy([start], 4) for start in (3, 4, 5)]
    for whole, slots in caches:
        assert not whole.keys[slots:].any() and not whole.values[slots:].any()
        assert whole.keys[slots - BLOCK_SIZE].any() and not whole.keys[slots - BLOCK_SIZE + 1 : slots].any()


def test_only_changed_table_rows_cross_to_the_device() -> None:
    tables = Tables(4, 16, 99, torch.device(triton_interpreter.DEVICE))
    rows = [[3, 4, 5], [7, 9]]
    for sent in (2, 2):  # the second time nothing changed
        tables.put(rows)
        assert (tables.rows_sent, tables.paged) == (sent, True)
    assert tables.tensor[:, :4].tolist() == [[3, 4, 5, 99], [7, 9, 99, 99], [99] * 4, [99] * 4]
    rows[0].append(6)
    tables.put(rows)
    assert tables.rows_sent == 3 and tables.tensor[0, :5].tolist() == [3, 4, 5, 6, 99]
    tables.put(rows[:1])
    assert tables.rows_sent == 4 and not tables.paged and tables.tensor[1].tolist() == [99] * 16
    rows[0][1] = 8  # a block of the middle was replaced
    tables.put(rows[:1])
    assert tables.rows_sent == 5 and tables.paged and tables.tensor[0, :5].tolist() == [3, 8, 5, 6, 99]


def test_requests_without_a_seed_share_no_noise() -> None:
    decoder = cuda_decoder(MODEL, cache_tokens=1024)
    params = [SamplingParams(temperature=50.0)] * 3

    def run() -> list[list[int]]:
        sequences = [decoder.new_sequence(32) for _ in params]
        return decoder.decode(sequences, [3] * 3, params, 8).token_ids.tolist()

    rows = run() + run()
    assert len({tuple(row) for row in rows}) == 6


def test_impossible_calls_of_decode_take_nothing() -> None:
    """Refused, or done with nothing to do, before a block is taken."""
    decoder = cuda_decoder(MODEL, cache_tokens=128)
    greedily = SamplingParams(temperature=0.0)
    nothing = decoder.decode([], [], [], 5)
    assert nothing.token_ids.shape == (0, 5) and nothing.truncated.shape == (0,)
    sequences = [decoder.new_sequence(8) for _ in range(65)]
    with pytest.raises(InputError, match="at most 64 sequences, got 65"):
        decoder.decode(sequences, [1] * 65, [greedily] * 65, 1)
    with pytest.raises(InputError, match="1 sequences, 2 token ids and 1 params"):
        decoder.decode(sequences[:1], [1, 2], [greedily], 1)
    assert not any(sequence.blocks for sequence in sequences)


def test_a_top_k_beyond_the_candidates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persimmon.fast.cuda.decoder.CANDIDATES", 16)
    monkeypatch.setattr("persimmon.fast.cuda.kernels.sampling.CANDIDATES", 16)
    decoder = cuda_decoder(MODEL, cache_tokens=128)
    sequence = decoder.new_sequence(64)
    with pytest.raises(InputError, match="top_k on the device must be at most 16, got 17"):
        decoder.decode([sequence], [1], [SamplingParams(temperature=1.0, top_k=17)], 1)
    everything = SamplingParams(temperature=1.0, top_k=MODEL.config.vocab_size, seed=1)  # is no top-k at all
    drawn = decoder.decode([sequence], [1], [everything], 4)
    other = decoder.decode([decoder.new_sequence(64)], [1], [SamplingParams(temperature=1.0, seed=1)], 4)
    assert drawn.token_ids.tolist() == other.token_ids.tolist() and not drawn.truncated.any()


def test_arrays_of_a_pass_are_aligned_alike() -> None:
    """Triton compiles a kernel anew for an array that begins at no multiple of 16 bytes."""
    runner = cuda_decoder(MODEL, cache_tokens=512)._runner()
    for size in (3, 17, 22):
        work = runner._pass([Piece([0, 1], 0, [1] * size, "all")], [_Part(0, 0, size)])
        assert work.ids.shape == (size,) and work.positions.tolist() == list(range(size))
        assert all(t.storage_offset() % 4 == 0 for t in (work.ids, work.positions, work.rows))
        assert work.tables.stride(0) % 16 == 0


def test_rows_that_draw_in_a_pass_read_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = cuda_decoder(MODEL, cache_tokens=512)
    rows: list[int] = []
    logits = decoder._network.logits
    monkeypatch.setattr(decoder._network, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    chunks = [Chunk(decoder.new_sequence(8), [5, 9, 11][:size]) for size in (3, 1, 2)]
    drawn = decoder.draw(chunks, [Draw(SamplingParams(temperature=0.0), 1, 0)] * 3, np.array([], np.int64))
    assert drawn == [greedy([5, 9, 11][:size], 1)[0] for size in (3, 1, 2)] and rows == [3]
