"""Captured steps with a stand-in for CUDA graphs: what is captured when, and that replays see the buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import triton_interpreter  # noqa: F401 - skips without triton
from cuda_decoders import cuda_decoder
from persimmon.fast.cuda.graphs import BUCKETS, Replay, Step, StepGraphs, bucket_for
from persimmon.infer.decoder import Chunk
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
