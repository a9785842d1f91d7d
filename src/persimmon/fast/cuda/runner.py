"""From pieces of sequences to logits: batches of single tokens replay a captured step, everything else runs in passes.

Decode path. Every piece is one token: the rows are padded to a bucket, ids, positions and block tables are copied into
the bucket's fixed buffers and its step is replayed. `decode` adds sampling to the step, so that many tokens follow each
other without the host: the sampled id becomes the next input where it lies.
Pass path. Pieces of any length, cut into passes of at most `max_pass_tokens`, run launch by launch: decoding rows and
prompt pieces share one pass, so the weights are read once for both.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon.fast.cuda.graphs import BUCKETS, Capture, Step, StepGraphs, bucket_for
from persimmon.fast.cuda.kernels.sampling import SamplingState, sample
from persimmon.fast.cuda.network import SHORT_PIECE, LongPiece, Network, Pass
from persimmon.fast.cuda.plan import LOGIT_ROWS
from persimmon.fast.cuda.pool import Pool, follow_each_other
from persimmon.infer.decoder import Logits
from persimmon.infer.drawing import Draw, Picked
from persimmon.infer.params import SamplingParams

MAX_PASS_TOKENS = 2_048
"""Tokens of one pass: enough to keep matrix units busy, and 64 MiB of MLP activations of the 8B in bfloat16."""

MOST_STEPS = 1_024
"""Tokens that one `decode` call may draw per row: the room of its output buffer."""


Banned: TypeAlias = NDArray[np.int64] | Sequence[int]
"""Ids that are never picked."""


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


class _Buffers:
    """The fixed buffers of a bucket, and what a step leaves in them."""

    def __init__(self, rows: int, width: int, vocabulary: int, scratch: int, device: torch.device) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.size, self._scratch = rows, scratch
        self.ids, self.positions = ints(rows), ints(rows)
        self.rows = torch.arange(rows, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, width), scratch, dtype=torch.int32, device=device)
        self.outputs = ints(rows, MOST_STEPS)
        self.logits = torch.zeros(rows, vocabulary, device=device)
        self.banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.banned_ids: object = None  # whose mask that is
        self.unusable = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sampling = SamplingState.room_for(rows, device)
        self._host_tables = np.full((rows, width), scratch, np.int32)

    def idle(self) -> None:
        """A state in which running the step harms nothing: all rows are padding."""
        self.fill([], [], [])

    def fill(self, ids: Sequence[int], positions: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        """The rows of a batch; the rest is padding. Tables go over only when they changed."""
        padding = self.size - len(ids)
        numbers = torch.tensor([[*ids, *[0] * padding], [*positions, *[0] * padding]], dtype=torch.int32)
        self.ids.copy_(numbers[0], non_blocking=True)
        self.positions.copy_(numbers[1], non_blocking=True)
        tables = np.full_like(self._host_tables, self._scratch)
        for row, held in enumerate(blocks):
            tables[row, : len(held)] = held
        if not np.array_equal(tables, self._host_tables):
            self._host_tables = tables
            self.tables.copy_(torch.from_numpy(tables))

    def sample_with(self, params: Sequence[SamplingParams], seeds: Sequence[int], drawn: Sequence[int]) -> None:
        """What the rows ask for; padding is greedy."""
        state = self.sampling
        columns: dict[str, list[float] | list[int]] = {
            "temperature": [p.temperature for p in params], "top_k": [p.top_k for p in params],
            "top_p": [p.top_p for p in params], "min_p": [p.min_p for p in params],
            "seed": [seed % 2**63 for seed in seeds], "count": list(drawn), "truncated": [0] * len(params),
        }  # fmt: skip
        for name, values in columns.items():
            target: Tensor = getattr(state, name)
            padding = [1 if name == "top_p" else 0] * (self.size - len(values))
            target.copy_(torch.tensor([*values, *padding], dtype=target.dtype))


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
        self._buffers: dict[int, _Buffers] = {}
        self._mask: tuple[object, Tensor] | None = None  # of the banned ids that were seen last

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
            if waiting:
                picked = self._pick(torch.cat(list(waiting.values())), [draws[i] for i in waiting], banned)
                drawn |= dict(zip(waiting, picked, strict=True))
        whole = [np.concatenate(r) if r else None for r in results]
        return [drawn[i] if i in drawn else _shaped(whole[i], piece) for i, piece in enumerate(pieces)]

    # -- single tokens -------------------------------------------------------------------------------------------

    def _rows(self, pieces: Sequence[Piece], draws: Sequence[Draw | None], banned: Banned) -> list[Picked]:
        """Of one token each, at most a bucket: tokens that are drawn in the step itself where all rows draw."""
        if all(draw is not None for draw in draws):
            buffers = self._replay_sampling(pieces, [draw for draw in draws if draw is not None], banned)
            count, state = len(pieces), buffers.sampling
            return _fetch(buffers.ids[:count], state.truncated[:count], buffers.unusable[:count], buffers.logits)
        return self._pick(self._decode_logits(pieces), draws, banned)

    def _pick(self, logits: Tensor, draws: Sequence[Draw | None], banned: Banned) -> list[Picked]:
        """Of logits [B, V] on the device: drawn there for rows that draw, logits [V] on the host for the others."""
        chosen = [row for row, draw in enumerate(draws) if draw is not None]
        rest = [row for row, draw in enumerate(draws) if draw is None]
        found: dict[int, Picked] = {}
        if rest:
            host = (logits if not chosen else logits[rest]).to("cpu", copy=True).numpy()
            found |= dict(zip(rest, host, strict=True))
        if chosen:
            scratch = _Buffers(len(chosen), 1, logits.shape[1], self.pool.scratch, self._device)
            scratch.logits.copy_(logits if not rest else logits[chosen])
            wanted = [draw for draw in draws if draw is not None]
            filters = self._set_sampling(scratch, wanted, banned)
            _sample(scratch, filters)
            picked = _fetch(scratch.ids, scratch.sampling.truncated, scratch.unusable, scratch.logits)
            found |= dict(zip(chosen, picked, strict=True))
        return [found[row] for row in range(len(draws))]

    def _set_sampling(self, buffers: _Buffers, draws: Sequence[Draw], banned: Banned) -> bool:
        """What a step that samples reads; whether any row has filters."""
        params = [draw.params for draw in draws]
        buffers.sample_with(params, [draw.seed for draw in draws], [draw.number for draw in draws])
        if buffers.banned_ids is not banned:
            if self._mask is None or self._mask[0] is not banned:
                mask = np.zeros(self._config.vocab_size, bool)
                mask[np.asarray(banned, np.int64)] = True
                self._mask = (banned, torch.from_numpy(mask).to(self._device))
            buffers.banned.copy_(self._mask[1])
            buffers.banned_ids = banned
        return _filters(params)

    def _replay_sampling(self, pieces: Sequence[Piece], draws: Sequence[Draw], banned: Banned) -> _Buffers:
        buffers, paged = self._ready(pieces)
        filters = _filters([draw.params for draw in draws])
        key = ("sample", buffers.size, paged, filters)
        self._prepare(key, buffers, lambda: self._sampling_step(buffers, paged, filters))
        self._fill(buffers, pieces)
        self._set_sampling(buffers, draws, banned)
        self._graphs.replay(key)
        return buffers

    def _decode_logits(self, pieces: Sequence[Piece]) -> Tensor:
        """[rows, V] of one token each, at most a bucket, on the device."""
        buffers, paged = self._ready(pieces)
        key = ("logits", buffers.size, paged)
        self._prepare(key, buffers, lambda: self._logits_step(buffers, paged))
        self._fill(buffers, pieces)
        self._graphs.replay(key)
        return buffers.logits[: len(pieces)]

    def decode(
        self, pieces: Sequence[Piece], params: Sequence[SamplingParams], num_tokens: int, banned: Sequence[int] = ()
    ) -> Decoded:
        """Store each piece's one token, draw the next, store that, ... `num_tokens` times, without the host in between.

        The blocks must have room for them. `params` of each row: temperature, top_k, top_p, min_p and seed count; the
        noise counts from the piece's position. banned: ids that are never drawn.
        """
        assert 1 <= num_tokens <= MOST_STEPS and len(pieces) <= BUCKETS[-1], "room in the buffers"
        with torch.inference_mode(), self._on_device():
            return self._decode(pieces, params, num_tokens, banned)

    def _decode(
        self, pieces: Sequence[Piece], params: Sequence[SamplingParams], num_tokens: int, banned: Sequence[int]
    ) -> Decoded:
        buffers, paged = self._ready(pieces)
        filters = _filters(params)
        key = ("sample", buffers.size, paged, filters)
        self._prepare(key, buffers, lambda: self._sampling_step(buffers, paged, filters))
        self._fill(buffers, pieces)
        # Counting from the position keeps a request's noise the same when it is paused and resumed.
        starts = [piece.start % MOST_STEPS for piece in pieces]
        buffers.sample_with(params, [p.seed or 0 for p in params], [piece.start for piece in pieces])
        buffers.banned.fill_(False)
        buffers.banned_ids = None
        if len(banned):
            buffers.banned[torch.tensor(list(banned), device=self._device)] = True
        for _ in range(num_tokens):
            self._graphs.replay(key)
        rows = buffers.outputs.cpu().numpy()
        drawn = [np.roll(rows[i], -start)[:num_tokens] for i, start in enumerate(starts)]
        return Decoded(np.stack(drawn), buffers.sampling.truncated[: len(pieces)].cpu().numpy())

    def _ready(self, pieces: Sequence[Piece]) -> tuple[_Buffers, bool]:
        """The bucket's buffers, and whether block tables must be looked up."""
        size = bucket_for(len(pieces))
        if size not in self._buffers:
            width = -(-self._config.max_positions // self.pool.block_size)
            width = max(width, *(len(piece.blocks) for piece in pieces))
            vocabulary = self._config.vocab_size
            self._buffers[size] = _Buffers(size, width, vocabulary, self.pool.scratch, self._device)
        return self._buffers[size], not all(follow_each_other(piece.blocks) for piece in pieces)

    def _prepare(self, key: Hashable, buffers: _Buffers, step: Step) -> None:
        if key not in self._graphs:
            buffers.idle()
            buffers.sample_with([], [], [])
            self._graphs.prepare(key, step)

    def _fill(self, buffers: _Buffers, pieces: Sequence[Piece]) -> None:
        ids, starts = [piece.token_ids[0] for piece in pieces], [piece.start for piece in pieces]
        buffers.fill(ids, starts, [piece.blocks for piece in pieces])

    def _logits_step(self, buffers: _Buffers, paged: bool) -> None:
        """What is captured: every row one token further."""
        work = Pass(buffers.ids, buffers.positions, buffers.rows, buffers.tables, paged, buffers.size)
        buffers.logits.copy_(self.network.logits(self.network.features(work, self.pool)))

    def _sampling_step(self, buffers: _Buffers, paged: bool, filters: bool) -> None:
        """The same, and the next token of every row."""
        self._logits_step(buffers, paged)
        _sample(buffers, filters)

    # -- passes --------------------------------------------------------------------------------------------------

    def _run_pass(
        self, pieces: Sequence[Piece], parts: Sequence[_Part], draws: Sequence[Draw | None],
        results: list[list[Logits]],
    ) -> dict[int, Tensor]:  # fmt: skip
        """One pass over parts of pieces, short ones first; appends the logits they ask for.

        Returns those that pieces with a draw wait for, [1, V] on the device, by piece.
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
                waiting[part.piece] = self.network.logits(hidden[offset + size - 1 : offset + size])
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
        ids, positions, rows = torch.tensor(numbers, dtype=torch.int32).T.contiguous().to(self._device)
        tables = [pieces[part.piece].blocks for part in parts]
        width = max(len(blocks) for blocks in tables)
        padded = torch.tensor([[*b, *[self.pool.scratch] * (width - len(b))] for b in tables], dtype=torch.int32)
        paged = not all(follow_each_other(blocks) for blocks in tables)
        return Pass(ids, positions, rows, padded.to(self._device), paged, num_short, long)


def _groups(count: int) -> Iterator[slice]:
    """Pieces in batches of at most the largest bucket."""
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


def _sample(buffers: _Buffers, filters: bool) -> None:
    """The next tokens of the buffers' logits, and which rows have none that could be picked."""
    buffers.logits.masked_fill_(buffers.banned, float("-inf"))
    torch.logical_not(torch.isfinite(buffers.logits.amax(1)), out=buffers.unusable)
    sample(buffers.logits, buffers.sampling, buffers.ids, buffers.positions, buffers.outputs, filters=filters)


def _fetch(ids: Tensor, truncated: Tensor, unusable: Tensor, logits: Tensor) -> list[Picked]:
    """Drawn tokens in one copy; the logits of rows that the host has to look at: a cut nucleus, nothing usable."""
    host = torch.stack([ids, truncated + unusable]).tolist()
    return [
        token if not unsure else logits[row].to("cpu", copy=True).numpy()
        for row, (token, unsure) in enumerate(zip(*host, strict=True))
    ]


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
