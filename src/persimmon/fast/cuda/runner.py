"""From pieces of sequences to logits: batches of single tokens replay a captured step, everything else runs in passes.

Decode path. Every piece is one token: the rows are padded to a bucket, ids, positions and block tables are copied into
the bucket's fixed buffers and its step is replayed. `decode` adds sampling to the step, so that many tokens follow each
other without the host: the sampled id becomes the next input where it lies.
Pass path. Pieces of any length, cut into passes of at most `max_pass_tokens`, run launch by launch: decoding rows and
prompt pieces share one pass, so the weights are read once for both. No graph is replayed in such a step.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon.fast.cuda.buffers import MOST_STEPS, Banned, Buffers, Shared, table_width
from persimmon.fast.cuda.graphs import BUCKETS, Capture, Step, StepGraphs, bucket_for
from persimmon.fast.cuda.network import SHORT_PIECE, LongPiece, Network, Pass
from persimmon.fast.cuda.plan import LOGIT_ROWS
from persimmon.fast.cuda.pool import Pool, follow_each_other
from persimmon.infer.decoder import Logits
from persimmon.infer.drawing import Draw, Picked
from persimmon.infer.params import SamplingParams

MAX_PASS_TOKENS = 2_048
"""Tokens of one pass: enough to keep matrix units busy, and 64 MiB of MLP activations of the 8B in bfloat16."""


class Piece(NamedTuple):
    """New tokens of a sequence that is stored in `blocks`, behind its first `start` tokens."""

    blocks: Sequence[int]
    start: int
    token_ids: Sequence[int]
    logits: Literal["none", "last", "all"]


@dataclass(frozen=True)
class _Part:
    """Tokens start .. end of a piece, run in one pass."""

    piece: int
    start: int
    end: int


@dataclass(frozen=True)
class Decoded:
    """Tokens drawn on the device."""

    token_ids: NDArray[np.int32]
    """[rows, tokens]."""
    truncated: NDArray[np.int32]
    """[rows]: draws whose top-p nucleus was larger than the candidates (kernels/sampling.py)."""


class Runner:
    """Runs pieces of sequences over one pool."""

    def __init__(
        self, network: Network, pool: Pool, *, capture: Capture | None = None, max_pass_tokens: int = MAX_PASS_TOKENS
    ) -> None:
        self.network, self.pool = network, pool
        self._device = network.weights.device
        self._config = network.weights.config
        self._max_pass_tokens = max_pass_tokens
        self._graphs = StepGraphs(capture)
        self._buffers: dict[int, Buffers] = {}
        self._shared: Shared | None = None

    def run(self, pieces: Sequence[Piece]) -> list[Logits | None]:
        """Store the pieces' tokens; float32 logits of each: None, [V] or [T, V]."""
        return cast(list[Logits | None], self.draw(pieces, [None] * len(pieces), ()))

    def draw(self, pieces: Sequence[Piece], draws: Sequence[Draw | None], banned: Banned) -> list[Picked | None]:
        """The same, but the token where a piece has a draw: see infer/drawing.py."""
        with torch.inference_mode(), self._on_device():
            return self._run(pieces, draws, banned)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on PyTorch's current device, which need not be this one."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _run(self, pieces: Sequence[Piece], draws: Sequence[Draw | None], banned: Banned) -> list[Picked | None]:
        if pieces and all(len(piece.token_ids) == 1 for piece in pieces):
            rows = [row for size in _groups(len(pieces)) for row in self._rows(pieces[size], draws[size], banned)]
            return [_shaped(row, piece) for row, piece in zip(rows, pieces, strict=True)]
        results: list[list[Logits]] = [[] for _ in pieces]
        drawn: dict[int, Picked] = {}
        for work in _passes([len(piece.token_ids) for piece in pieces], self._max_pass_tokens):
            waiting = self._run_pass(pieces, work, draws, results)
            for size in _groups(len(waiting)):
                chosen = list(waiting)[size]
                logits = self.network.logits(torch.stack([waiting[i] for i in chosen]))
                drawn |= dict(zip(chosen, self._pick(logits, [draws[i] for i in chosen], banned), strict=True))
        whole = [np.concatenate(r) if r else None for r in results]
        return [drawn[i] if i in drawn else _shaped(whole[i], piece) for i, piece in enumerate(pieces)]

    # -- single tokens -------------------------------------------------------------------------------------------

    def _rows(self, pieces: Sequence[Piece], draws: Sequence[Draw | None], banned: Banned) -> list[Picked]:
        """Of one token each, at most a bucket: tokens that are drawn in the step itself where all rows draw."""
        wanted = [draw for draw in draws if draw is not None]
        if len(wanted) < len(draws):
            return self._pick(self._decode_logits(pieces), draws, banned)
        params = [draw.params for draw in wanted]
        buffers, key = self._sampling(pieces, params)
        self._common().ban(banned)
        buffers.sample_with(params, [draw.seed for draw in wanted], [draw.number for draw in wanted])
        self._graphs.replay(key)
        return buffers.fetch(len(pieces))

    def _pick(self, logits: Tensor, draws: Sequence[Draw | None], banned: Banned) -> list[Picked]:
        """Of logits [B, V] on the device: drawn there for rows that draw, logits [V] on the host for the others."""
        chosen = [row for row, draw in enumerate(draws) if draw is not None]
        rest = [row for row, draw in enumerate(draws) if draw is None]
        found: dict[int, Picked] = {}
        if rest:
            host = (logits if not chosen else logits[rest]).to("cpu", copy=True).numpy()
            found |= dict(zip(rest, host, strict=True))
        if chosen:
            scratch = Buffers(len(chosen), 1, self._common(), self.pool.scratch, self._device)
            scratch.logits.copy_(logits if not rest else logits[chosen])
            wanted = [draw for draw in draws if draw is not None]
            params = [draw.params for draw in wanted]
            self._common().ban(banned)
            scratch.sample_with(params, [draw.seed for draw in wanted], [draw.number for draw in wanted])
            scratch.sample(filters=_filters(params))
            found |= dict(zip(chosen, scratch.fetch(len(chosen)), strict=True))
        return [found[row] for row in range(len(draws))]

    def _sampling(self, pieces: Sequence[Piece], params: Sequence[SamplingParams]) -> tuple[Buffers, Hashable]:
        """The bucket's buffers with the pieces in them, and the key of the step that samples."""
        buffers, paged = self._ready(pieces)
        filters = _filters(params)
        key = ("sample", buffers.size, paged, filters)
        self._prepare(key, buffers, lambda: self._sampling_step(buffers, paged, filters), pieces)
        return buffers, key

    def _decode_logits(self, pieces: Sequence[Piece]) -> Tensor:
        """[rows, V] of one token each, at most a bucket, on the device."""
        buffers, paged = self._ready(pieces)
        key = ("logits", buffers.size, paged)
        self._prepare(key, buffers, lambda: self._logits_step(buffers, paged), pieces)
        self._graphs.replay(key)
        return buffers.logits[: len(pieces)]

    def decode(
        self, pieces: Sequence[Piece], params: Sequence[SamplingParams], num_tokens: int, banned: Sequence[int] = ()
    ) -> Decoded:
        """Store each piece's one token, draw the next, store that, ... `num_tokens` times, without the host in between.

        The blocks must have room for them. `params` of each row: temperature, top_k, top_p, min_p and seed count, of
        which a row without one gets a random one; the noise counts from the piece's position. banned: ids that are
        never drawn.
        """
        assert 1 <= num_tokens <= MOST_STEPS and len(pieces) <= BUCKETS[-1], "room in the buffers"
        if not pieces:
            return Decoded(np.zeros((0, num_tokens), np.int32), np.zeros(0, np.int32))
        with torch.inference_mode(), self._on_device():
            return self._decode(pieces, params, num_tokens, banned)

    def _decode(
        self, pieces: Sequence[Piece], params: Sequence[SamplingParams], num_tokens: int, banned: Sequence[int]
    ) -> Decoded:
        buffers, key = self._sampling(pieces, params)
        # Counting from the position keeps a request's noise the same when it is paused and resumed.
        starts = [piece.start % MOST_STEPS for piece in pieces]
        seeds = [secrets.randbits(63) if p.seed is None else p.seed for p in params]
        buffers.sample_with(params, seeds, [piece.start for piece in pieces])
        self._common().ban(banned)
        for _ in range(num_tokens):
            self._graphs.replay(key)
        rows = buffers.outputs.cpu().numpy()
        drawn = [np.roll(rows[i], -start)[:num_tokens] for i, start in enumerate(starts)]
        return Decoded(np.stack(drawn), buffers.sampling.truncated[: len(pieces)].cpu().numpy())

    def _ready(self, pieces: Sequence[Piece]) -> tuple[Buffers, bool]:
        """The bucket's buffers with the pieces' block tables, and whether those must be looked up."""
        size = bucket_for(len(pieces))
        if size not in self._buffers:
            width = -(-self._config.max_positions // self.pool.block_size)
            width = table_width(max(width, *(len(piece.blocks) for piece in pieces)))
            self._buffers[size] = Buffers(size, width, self._common(), self.pool.scratch, self._device)
        buffers = self._buffers[size]
        buffers.tables.put([piece.blocks for piece in pieces])
        return buffers, buffers.tables.paged

    def _common(self) -> Shared:
        """Buffers that all buckets share."""
        if self._shared is None:
            self._shared = Shared(BUCKETS[-1], self._config.vocab_size, self._device)
        return self._shared

    def _prepare(self, key: Hashable, buffers: Buffers, step: Step, pieces: Sequence[Piece]) -> None:
        """Record the step if it is a new one, while all rows are padding; then the pieces' tokens into the buffers."""
        if key not in self._graphs:
            buffers.idle()
            self._graphs.prepare(key, step)
            buffers.tables.put([piece.blocks for piece in pieces])
        buffers.fill([piece.token_ids[0] for piece in pieces], [piece.start for piece in pieces])

    def _logits_step(self, buffers: Buffers, paged: bool) -> None:
        """What is captured: every row one token further."""
        work = Pass(buffers.ids, buffers.positions, buffers.rows, buffers.tables.tensor, paged, buffers.size)
        buffers.logits.copy_(self.network.logits(self.network.features(work, self.pool)))

    def _sampling_step(self, buffers: Buffers, paged: bool, filters: bool) -> None:
        """The same, and the next token of every row."""
        self._logits_step(buffers, paged)
        buffers.sample(filters=filters)

    # -- passes --------------------------------------------------------------------------------------------------

    def _run_pass(
        self, pieces: Sequence[Piece], parts: Sequence[_Part], draws: Sequence[Draw | None],
        results: list[list[Logits]],
    ) -> dict[int, Tensor]:  # fmt: skip
        """One pass over parts of pieces, short ones first; appends the logits they ask for.

        Returns the hidden states [H] of those that pieces with a draw wait for, by piece.
        """
        ordered = sorted(parts, key=lambda part: part.end - part.start > SHORT_PIECE)
        work = self._pass(pieces, ordered)
        hidden = self.network.features(work, self.pool)
        wanted: list[int] = []
        counts: list[tuple[int, int]] = []  # (piece, rows of logits)
        waiting: dict[int, Tensor] = {}
        offset = 0
        for part in ordered:
            piece, size = pieces[part.piece], part.end - part.start
            last = piece.logits == "last" and part.end == len(piece.token_ids)
            rows = range(offset, offset + size) if piece.logits == "all" else range(offset + size - 1, offset + size)
            if last and draws[part.piece] is not None:
                waiting[part.piece] = hidden[offset + size - 1]
            elif piece.logits == "all" or last:
                wanted += rows
                counts.append((part.piece, len(rows)))
            offset += size
        if not wanted:
            return waiting
        chosen = hidden[torch.tensor(wanted, device=self._device)]
        # Few at a time: 2,048 positions of the 8B would take 2 GiB, and unpack the head.
        logits = np.concatenate([self.network.logits(part).cpu().numpy() for part in chosen.split(LOGIT_ROWS)])
        row = 0
        for index, count in counts:
            results[index].append(logits[row : row + count])
            row += count
        return waiting

    def _pass(self, pieces: Sequence[Piece], parts: Sequence[_Part]) -> Pass:
        """Ids, positions and tables of a pass, in one copy to the device."""
        numbers: list[tuple[int, int, int]] = []
        long: list[LongPiece] = []
        num_short = 0
        for row, part in enumerate(parts):
            piece, size = pieces[part.piece], part.end - part.start
            before = piece.start + part.start
            if size > SHORT_PIECE:
                base = piece.blocks[0] * self.pool.block_size if follow_each_other(piece.blocks) else None
                long.append(LongPiece(len(numbers), size, row, before, base))
            else:
                num_short += size
            numbers += [(piece.token_ids[part.start + i], before + i, row) for i in range(size)]
        # Each of the three begins at a multiple of 16 bytes: kernels are compiled anew for less aligned arrays.
        room = -(-len(numbers) // 4) * 4
        together = torch.zeros(3, room, dtype=torch.int32)
        together[:, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32).T
        ids, positions, rows = together.to(self._device)[:, : len(numbers)]
        tables = [pieces[part.piece].blocks for part in parts]
        width = table_width(max(len(blocks) for blocks in tables))
        padded = torch.tensor([[*b, *[self.pool.scratch] * (width - len(b))] for b in tables], dtype=torch.int32)
        paged = not all(follow_each_other(blocks) for blocks in tables)
        return Pass(ids, positions, rows, padded.to(self._device), paged, num_short, long)


def _groups(count: int) -> Iterator[slice]:
    """So many rows in batches of at most the largest bucket."""
    for start in range(0, count, BUCKETS[-1]):
        yield slice(start, start + BUCKETS[-1])


def _shaped(found: Picked | None, piece: Piece) -> Picked | None:
    """Rows of logits, [V] or [T, V], as the piece asks for them."""
    if isinstance(found, int) or found is None or piece.logits == "none":
        return found if isinstance(found, int) else None
    rows = found.reshape(-1, found.shape[-1])
    return rows[-1] if piece.logits == "last" else rows


def _filters(params: Sequence[SamplingParams]) -> bool:
    """Whether a step that samples for them must sort logits."""
    return any(p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p) for p in params)


def _passes(sizes: Sequence[int], limit: int) -> Iterator[list[_Part]]:
    """Cut pieces of these sizes, in order, into passes of at most `limit` tokens."""
    work: list[_Part] = []
    room = limit
    for piece, size in enumerate(sizes):
        start = 0
        while start < size:
            end = min(size, start + room)
            work.append(_Part(piece, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield work
                work, room = [], limit
    if work:
        yield work
