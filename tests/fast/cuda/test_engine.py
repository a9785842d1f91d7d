"""Continuous batching over the CUDA engine: the same greedy answers as the reference, with sharing and mixed steps."""

from __future__ import annotations

from collections.abc import Sequence

import triton_interpreter  # noqa: F401 - skips without triton
from cuda_decoders import cuda_decoder
from persimmon.infer.block_cache import PagedReference
from persimmon.infer.engine import Engine, Request
from persimmon.infer.paged import PagedChunk, page
from persimmon.infer.params import SamplingParams
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(max_positions=128)


def answers(engine: Engine, prompts: Sequence[str], later: Sequence[str] = ()) -> dict[str, list[int]]:
    """Greedy token ids by prompt; the later ones are submitted when the first are running."""

    def submit(texts: Sequence[str]) -> None:
        for text in texts:
            engine.submit(
                Request(text, tuple(TOKENIZER.encode(text, bos=True)), SamplingParams(max_tokens=5, temperature=0))
            )

    submit(prompts)
    found: dict[str, list[int]] = {}
    waiting = list(later)
    while engine.busy:
        for update in engine.step():
            assert update.failure is None, update.failure
            if update.piece is not None:
                found.setdefault(update.request_id, []).extend(update.piece.token_ids)
        submit(waiting)
        waiting = []
    return found


def test_a_crowd_gets_the_references_answers() -> None:
    """Prompts cut into steps of 8 tokens beside decoding rows; later requests share the blocks of an earlier prefix."""
    prefix = "the story of light and the letters of a long "
    prompts, later = [prefix + "day", "a b c"], [prefix + "night", prefix + "day off"]
    expected = answers(Engine(PagedReference(MODEL, 32, 8), TOKENIZER, step_tokens=8), prompts, later)
    decoder = page(cuda_decoder(MODEL, cache_tokens=64), 32, 8, max_sequences=4)
    assert (decoder.name, decoder.shares_blocks) == ("cuda", True)
    engine = Engine(decoder, TOKENIZER, step_tokens=8)
    assert answers(engine, prompts, later) == expected
    assert engine.state.prompt_tokens_found > 0
    assert engine.state.blocks_held == 0


def test_blocks_in_any_order_shared_copied_and_written_again() -> None:
    """Tables that jump, a block in two tables, a copy, and the same call once more."""
    paged = cuda_decoder(MODEL, cache_tokens=64).paged(8, 8)
    reference = PagedReference(MODEL, 8, 8)
    ids = [3, 9, 27, 81, 243, 89, 267, 161, 163, 169, 187, 241]

    def both(chunks: list[PagedChunk]) -> None:
        for ours, theirs in zip(paged.forward(chunks), reference.forward(chunks), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or abs(ours - theirs).max() < 1e-4

    both([PagedChunk([6, 1], 0, ids[:10], "all")])
    both([PagedChunk([6, 4], 8, ids[8:11], "last"), PagedChunk([6, 1], 10, ids[10:11])])  # block 6 is shared
    for decoder in (paged, reference):
        decoder.copy_blocks([(1, 3), (3, 5)])
    both([PagedChunk([6, 5], 11, ids[11:12])])
    both([PagedChunk([6, 5], 11, ids[11:12])])
    both([PagedChunk([2], 0, ids[:1], "none"), PagedChunk([6, 5], 11, ids[11:12])])
