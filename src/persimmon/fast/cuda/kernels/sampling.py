"""The next token on the device: greedy, temperature, top-k, top-p, min-p, without the host.

    threshold   per row, the smallest logit that the filters leave: from the CANDIDATES largest logits, sorted
    pick        every block of the vocabulary: its best score. Greedy: the logit. Else logit / temperature + Gumbel
                noise, the largest of which is a draw from the softmax (Gumbel 1954), so no sum over the row is needed
    advance     the best of the blocks; the token is appended to the row's output, becomes its next input, and the
                position moves on

Noise is counter-based (Philox 4x32-10): keyed by the request's seed, counted by token id and by the number of the token
in the request, so a request draws the same whatever else runs and wherever it was paused. The stream is another one
than `infer/sampling.py`'s, which draws in float64 from NumPy's Philox: same distribution, other tokens.
Filters work in the order of `infer/sampling.py`: temperature, top-k, top-p of what top-k left, min-p. Two limits:
tokens with exactly the logit of the last one kept are all kept; and top-k and top-p see no more than CANDIDATES tokens,
`truncated` says for which rows more were asked for (their draw is from the candidates alone).
Ties of greedy scores go to the lower id. Banned tokens have been set to -inf by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from persimmon.fast.cuda.kernels.launch import begin, ceil_div, early, power_of_two, tile

CANDIDATES = 1_024
"""Largest logits that top-k and top-p look at."""


@dataclass
class SamplingState:
    """What the rows of a batch ask for, [B] each, on the device: a replayed graph reads what stands there."""

    temperature: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int32; 0 is off."""
    top_p: Tensor
    """float32; 1 is off."""
    min_p: Tensor
    """float32; 0 is off."""
    seed: Tensor
    """int64."""
    count: Tensor
    """int32: tokens drawn so far in the request; the counter of the noise."""
    truncated: Tensor
    """int32: draws whose nucleus or top-k was cut at CANDIDATES."""
    live: Tensor
    """int32: 0 for a row that is only padding. It stays where it is, as its block has room for few tokens."""

    @classmethod
    def room_for(cls, rows: int, device: torch.device) -> SamplingState:
        """Greedy rows, all live."""
        floats = [torch.full((rows,), value, device=device) for value in (0.0, 1.0, 0.0)]
        ints = [torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(3)]
        seed = torch.zeros(rows, dtype=torch.int64, device=device)
        live = torch.ones(rows, dtype=torch.int32, device=device)
        return cls(floats[0], ints[0], floats[1], floats[2], seed, ints[1], ints[2], live)


@triton.jit
def threshold_kernel(
    candidates, sums, temperature, top_k, top_p, min_p, truncated, thresholds, num_candidates, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates [B, C] descending; sums [B] of exp((logit - largest) / temperature) over the whole row."""
    row = tl.program_id(0)
    rank = tl.arange(0, BLOCK)
    inside = rank < num_candidates
    logit = tl.load(candidates + row.to(tl.int64) * num_candidates + rank, mask=inside, other=-float("inf"))
    heat = tl.load(temperature + row)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    largest = tl.max(logit, axis=0)
    share = tl.where(inside, tl.exp((logit - largest) / tl.where(heat > 0.0, heat, 1.0)), 0.0)
    kept = inside & ((rank < k) | (k <= 0))
    total = tl.where(k > 0, tl.sum(tl.where(kept, share, 0.0), axis=0), tl.load(sums + row))
    before = tl.cumsum(tl.where(kept, share, 0.0), axis=0) - share  # mass of the better ones
    in_nucleus = kept & (before < tl.where(p < 1.0, p * total, float("inf")))
    stays = in_nucleus & (share >= least)
    count = tl.sum(stays.to(tl.int32), axis=0)
    filtered = (heat > 0.0) & ((k > 0) | (p < 1.0))
    lowest = tl.min(tl.where(stays, logit, float("inf")), axis=0)
    by_share = largest + tl.log(least) * heat  # min-p alone needs no candidates: a bound on every logit
    bound = tl.where(filtered, lowest, tl.where((heat > 0.0) & (least > 0.0), by_share, -float("inf")))
    tl.store(thresholds + row, bound)
    cut = filtered & (num_candidates < vocabulary) & ((k > num_candidates) | ((k <= 0) & (count == num_candidates)))
    tl.store(truncated + row, tl.load(truncated + row) + cut.to(tl.int32))


@triton.jit
def _gumbel(key, number, token, BLOCK: tl.constexpr):
    """Noise [BLOCK] of tokens in draw `number` of the request with the seed `key`."""
    zero = tl.zeros([BLOCK], tl.uint32)
    bits, _, _, _ = tl.philox(key, token.to(tl.uint32), zero + number.to(tl.uint32), zero, zero)
    # Gumbel noise is -log of an exponential, -log(1 - u). The largest noise decides, so small u must be fine: 32 bits,
    # and the logarithm's series where 1 - u would lose them.
    u = (bits.to(tl.float32) + 0.5) * (1.0 / 4_294_967_296.0)
    exponential = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * 0.3333333)), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def pick_kernel(
    logits, thresholds, temperature, seed, count, best_score, best_id, vocabulary, num_blocks,
    EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Best score and its id of one block of one row."""
    begin(EARLY)
    block, row = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    logit = tl.load(logits + row.to(tl.int64) * vocabulary + token, mask=inside, other=-float("inf"))
    heat = tl.load(temperature + row)
    score = logit
    if heat > 0.0:
        score = logit / heat + _gumbel(tl.load(seed + row), tl.load(count + row), token, BLOCK)
    allowed = inside & (logit >= tl.load(thresholds + row)) & (logit > -float("inf"))
    score = tl.where(allowed, score, -float("inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(allowed & (score == best), token, vocabulary), axis=0)
    tl.store(best_score + row * num_blocks + block, best)
    tl.store(best_id + row * num_blocks + block, winner)


@triton.jit
def advance_kernel(
    best_score, best_id, ids, positions, count, live, outputs, output_stride, num_blocks, vocabulary,
    EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The winner of a row to `ids` and to outputs[row, count]; position and count of a live row move on."""
    begin(EARLY)
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    inside = block < num_blocks
    score = tl.load(best_score + row * num_blocks + block, mask=inside, other=-float("inf"))
    number = tl.load(best_id + row * num_blocks + block, mask=inside, other=vocabulary)
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best, number, vocabulary), axis=0)
    winner = tl.minimum(winner, vocabulary - 1)  # a row without any number keeps inside the vocabulary
    drawn = tl.load(count + row)
    tl.store(ids + row, winner.to(ids.dtype.element_ty))
    tl.store(outputs + row.to(tl.int64) * output_stride + drawn % output_stride, winner)
    step = tl.load(live + row)
    tl.store(count + row, drawn + step)
    tl.store(positions + row, tl.load(positions + row) + step)


def pick_tiles() -> dict[str, int]:
    """Compile-time tile size of pick."""
    return {"BLOCK": tile(4096, 65_536)}


def sample(
    logits: Tensor, state: SamplingState, ids: Tensor, positions: Tensor, outputs: Tensor, *, filters: bool
) -> None:
    """Next tokens of logits [B, V] float32, into ids [B] int32 and outputs [B, room] int32; positions [B] += `live`.

    filters: whether any row has temperature with top-k, top-p or min-p; without them no logits are sorted. Output
    column is the row's `count`.
    """
    rows, vocabulary = logits.shape
    thresholds = torch.full((rows,), float("-inf"), device=logits.device)
    if filters:
        candidates = min(CANDIDATES, vocabulary)
        largest = torch.topk(logits, candidates, dim=1, sorted=True).values
        heat = torch.where(state.temperature > 0, state.temperature, 1.0)[:, None]
        # In place: one array of the logits' size, which the planner counts (plan.py).
        sums = (logits - largest[:, :1]).div_(heat).exp_().sum(1)
        threshold_kernel[(rows,)](
            largest, sums, state.temperature, state.top_k, state.top_p, state.min_p, state.truncated, thresholds,
            candidates, vocabulary, BLOCK=power_of_two(candidates),
        )  # fmt: skip
    tiles = pick_tiles()
    blocks = ceil_div(vocabulary, tiles["BLOCK"])
    score = torch.empty(rows, blocks, device=logits.device)
    winner = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    pick_kernel[(blocks, rows)](
        logits, thresholds, state.temperature, state.seed, state.count, score, winner, vocabulary, blocks,
        **early(logits.device), **tiles,
    )  # fmt: skip
    advance_kernel[(rows,)](
        score, winner, ids, positions, state.count, state.live, outputs, outputs.stride(0), blocks, vocabulary,
        BLOCK=power_of_two(blocks), **early(logits.device),
    )  # fmt: skip
