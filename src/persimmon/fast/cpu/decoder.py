"""The CPU engine's Decoder: Python checks what it is given, one native call does the rest."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, ContextLengthError, InputError, UnavailableError
from persimmon.fast.cpu.formats import Format, why_unfit
from persimmon.fast.cpu.memory import GIB, kv_bytes_per_token
from persimmon.fast.cpu.native_module import native
from persimmon.infer.decoder import CachedSequence, Chunk, Logits, Scored, check_token_ids
from persimmon.infer.identity import fingerprint
from persimmon.infer.stored_sequence import StoredSequence, own_sequences
from persimmon.machine import check_threads, cpu_threads, memory_available

if TYPE_CHECKING:
    from persimmon.fast.cpu.paged import PagedCpu

KV_DTYPES = ("auto", "float32", "int8")

DEFAULT_MARGIN = 0.5
"""Standard deviations of what a neuron's top two bits leave out; missed are active neurons with small activations.

On mini and mini-base it adds 2 % to the format's own KL divergence of 1.0e-2 to 1.5e-2 nats; 0.75 adds 1 %, 1 adds
0.4 % and reads a quarter more rest rows (docs/sparsity.md).
"""

SEQUENCE_BLOCK = 16
"""Tokens of a block of a sequence's own cache. A tile of the attention kernel then has four blocks, and memory that is
read in four places at a time arrives at 33 GB/s where one place gives 27 to 30 (docs/LOG.md, 2026-11-27)."""


class CpuSequence(StoredSequence):
    """One sequence with a cache of its own: all blocks of it, in their order."""

    def __init__(self, model: Any, capacity: int, int8: bool) -> None:
        super().__init__(capacity)
        blocks = -(-capacity // SEQUENCE_BLOCK)
        self._cache = model.new_cache(blocks, SEQUENCE_BLOCK, int8)
        self._table = np.arange(blocks, dtype=np.int32)

    def close(self) -> None:
        """Give the memory back."""
        super().close()
        self._cache.close()

    def saved(self, layer: int, length: int) -> NDArray[np.uint8]:
        """The records of the first `length` tokens in a layer (native/kv_cache.h), as bytes."""
        data: NDArray[np.uint8] = self._cache.save(layer, self._table, length)
        return data

    def restore(self, length: int, saved_length: int, layers: Iterable[NDArray[np.uint8]]) -> None:
        """Hold the first `length` tokens of what `saved` gave for `saved_length`, layer by layer."""
        self.truncate(0)
        self.check_room(length)
        expected = self._cache.state_bytes(saved_length)
        for layer, data in enumerate(layers):
            if data.nbytes != expected:
                raise InputError(f"{data.nbytes} bytes are not the keys and values of {saved_length} tokens")
            self._cache.restore(layer, self._table, length, data[: self._cache.state_bytes(length)])
        self._length = length

    def place(self) -> Place:
        """Where the next tokens go."""
        return self._cache, self._table, self._length


Place = tuple[Any, NDArray[np.int32], int]
"""A native cache, the blocks of a sequence in it, and the tokens that are stored there."""

Wanted = Literal["none", "last", "all"]


class CpuDecoder:
    """Runs packed or plain weights with the native kernels.

    The logits of a token are the same to the last bit for every number of threads, every cut of the prompt into chunks
    and whatever else is in the call: all sums have one fixed order. It is the same on every instruction set but for
    bfloat16 weights on AMX.
    """

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        form: Format,
        arrays: Mapping[str, NDArray[Any]],
        *,
        threads: int | None = None,
        kv_dtype: str = "auto",
        sparsity_margin: float = DEFAULT_MARGIN,
        audit_every: int = 0,
        isa: str = "auto",
        weights: str = "mapped",
    ) -> None:
        """`arrays` as in formats.py. sparsity_margin: see docs/sparsity.md; `inf` skips nothing that is not zero.

        audit_every: recompute one decoded token in this many without skipping, and count what was missed; 0 never.
        isa: instruction set, `auto` the best of this processor. weights: where they are, mapped or resident.
        """
        _check_options(threads, kv_dtype, sparsity_margin, audit_every, isa)
        self._config, self._form, self._arrays, self.weights = config, form, arrays, weights
        self._kv_dtype = kv_dtype if kv_dtype != "auto" else ("int8" if form.packed else "float32")
        if (reason := why_unfit(config)) is not None:
            raise UnavailableError(reason)
        cos, sin = _rotary_tables(config)
        try:
            self._model = native().Model(
                vocab=config.vocab_size, hidden=config.hidden_size, intermediate=config.intermediate_size,
                layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim,
                rotary_dim=config.rotary_dim, max_positions=config.max_positions, eps=config.layer_norm_eps,
                qk_norm=config.qk_layernorm, attention=form.attention, mlp=form.mlp, head=form.head,
                embedding_bf16=arrays["embed_tokens.weight"].itemsize == 2, tensors=dict(arrays), cos=cos, sin=sin,
                isa=isa, threads=threads or cpu_threads(),
            )  # fmt: skip
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        self._model.margin = sparsity_margin
        self._model.audit_every = audit_every

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def form(self) -> Format:
        """Format of the weights."""
        return self._form

    @property
    def kv_dtype(self) -> str:
        """float32 or int8."""
        return self._kv_dtype

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return int(self._model.threads)

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return str(self._model.isa)

    def layer_counts(self) -> list[dict[str, float]]:
        """Per layer since the last reset: tokens, candidates, active, and in q4 groups with an active neuron; audited
        tokens, their active and missed neurons, and squared norms of the output's error and of the output.
        """  # noqa: D205
        return list(self._model.counts())

    def reset_counts(self) -> None:
        """Start counting anew."""
        self._model.reset_counts()

    def new_sequence(self, capacity: int) -> CpuSequence:
        """An empty sequence for up to `capacity` tokens.

        Raises ContextLengthError beyond max_positions, UnavailableError when its keys and values cannot fit in memory.
        """
        limit = self._config.max_positions
        if not 1 <= capacity <= limit:
            raise ContextLengthError(f"a sequence of {capacity} tokens: the model has 1 to {limit}")
        self._check_memory(capacity)
        return CpuSequence(self._model, capacity, self._kv_dtype == "int8")

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """See infer.prompt_file. Threads change no bit, AMX changes those of bfloat16 weights; the margin decides what
        an MLP adds.
        """  # noqa: D205
        weights = ((name, array.reshape(-1).view(np.uint8)) for name, array in sorted(self._arrays.items()))
        facts = {
            "engine": self.name,
            "weights": fingerprint(self._config, weights),
            "format": self._form.name,
            "rotary_precision": self._config.rotary_precision,
            "kv_dtype": self._kv_dtype,
        }
        if self._form.attention == "bfloat16" and self.isa == "amx":
            facts["sums"] = "amx"
        return facts | ({"sparsity_margin": repr(self._model.margin)} if self._form.mlp == "planes" else {})

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        return kv_bytes_per_token(self._config, self._kv_dtype)

    def paged(self, num_blocks: int, block_size: int) -> PagedCpu:
        """The same model over a cache of blocks, for continuous batching (see infer.paged).

        Raises UnavailableError when the blocks cannot fit in memory.
        """
        from persimmon.fast.cpu.paged import PagedCpu

        if num_blocks < 1 or block_size < 1 or block_size % native().KEY_GROUP:
            raise InputError(f"block_size must be a multiple of {native().KEY_GROUP}, got {num_blocks} of {block_size}")
        self._check_memory(num_blocks * block_size)
        cache = self._model.new_cache(num_blocks, block_size, self._kv_dtype == "int8")
        return PagedCpu(self, cache, num_blocks, block_size)

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its sequence; its float32 logits: None, [V] or [T, V] (see infer.decoder)."""
        sequences = self._check(chunks)
        places = [sequence.place() for sequence in sequences]
        results = self.run(places, [(c.token_ids, c.logits) for c in chunks], exact_top)
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.advance(len(chunk.token_ids))
        return results

    def greedy(
        self, sequence: CachedSequence, token_id: int, count: int, banned: NDArray[np.int64], stop_id: int
    ) -> list[int]:
        """See infer.drawing.GreedyDecoder; InputError for less than one step or banned ids outside the vocabulary."""
        if count < 1:
            raise InputError(f"greedy steps must be 1 or more, got {count}")
        if len(banned):
            check_token_ids("the list of banned tokens", banned.tolist(), self._config.vocab_size)
        (own,) = own_sequences([Chunk(sequence, [token_id])], CpuSequence, self._config.vocab_size)
        own.check_room(count)
        try:
            picked: list[int] = self._model.greedy(*own.place(), token_id, count, banned.astype(np.int32), stop_id)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        own.advance(len(picked))
        return picked

    def score(self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]) -> list[Scored]:
        """Append each chunk; what its last positions say about as many targets (see infer.decoder.ScoringDecoder)."""
        sequences = self._check(chunks)
        for chunk, wanted in zip(chunks, targets, strict=True):
            if len(wanted) > len(chunk.token_ids):
                raise InputError(f"{len(wanted)} targets for a chunk of {len(chunk.token_ids)} tokens")
            if wanted:
                check_token_ids("the targets", wanted, self._config.vocab_size)
        calls = [
            (*sequence.place(), np.asarray(chunk.token_ids, np.int32), len(wanted))
            for sequence, chunk, wanted in zip(sequences, chunks, targets, strict=True)
        ]
        flat = np.fromiter((token for wanted in targets for token in wanted), np.int32)
        scores, likeliest = np.empty(len(flat), np.float64), np.empty(len(flat), np.int32)
        try:
            self._model.score(calls, flat, scores, likeliest)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.advance(len(chunk.token_ids))
        ends = np.cumsum([len(wanted) for wanted in targets])[:-1]
        return [Scored(*parts) for parts in zip(np.split(scores, ends), np.split(likeliest, ends), strict=True)]

    def run(
        self, places: Sequence[Place], chunks: Sequence[tuple[Sequence[int], Wanted]], exact_top: int | None
    ) -> list[Logits | None]:
        """Store checked chunks of tokens in their places; the logits that each wants."""
        calls, counts = [], []
        for place, (token_ids, wanted) in zip(places, chunks, strict=True):
            counts.append({"none": 0, "last": 1, "all": len(token_ids)}[wanted])
            calls.append((*place, np.asarray(token_ids, np.int32), counts[-1]))
        logits = np.empty((sum(counts), self._config.vocab_size), np.float32)
        try:
            self._model.forward(calls, min(exact_top or 0, self._config.vocab_size), logits)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        ends = itertools.accumulate(counts)  # numpy's own splitting takes longer than a layer of a small model
        return [
            None if wanted == "none" else logits[end - 1] if wanted == "last" else logits[end - count : end]
            for end, count, (_, wanted) in zip(ends, counts, chunks, strict=True)
        ]

    def _check_memory(self, num_tokens: int) -> None:
        needed, free = num_tokens * self.token_bytes, memory_available()
        if free is not None and needed > free:
            raise UnavailableError(
                f"keys and values of {num_tokens} tokens need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: "
                "use a shorter context" + ("" if self._kv_dtype == "int8" else " or int8 keys and values")
            )

    def _check(self, chunks: Sequence[Chunk]) -> list[CpuSequence]:
        """Refuse a call before it changes anything."""
        sequences = own_sequences(chunks, CpuSequence, self._config.vocab_size)
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.check_room(len(chunk.token_ids))
        return sequences


def _check_options(threads: int | None, kv_dtype: str, margin: float, audit_every: int, isa: str) -> None:
    check_threads(threads)
    if kv_dtype not in KV_DTYPES:
        raise InputError(f"kv_dtype of the cpu engine must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    if math.isnan(margin) or margin < 0:
        raise InputError(f"sparsity_margin must be from 0 to inf, got {margin}")
    if audit_every < 0:
        raise InputError(f"audit_every must be 0 or more, got {audit_every}")
    known = ("auto", *native().supported_isas())
    if isa not in known:
        raise UnavailableError(f"instruction set {isa!r} is not available here; there are: {', '.join(known)}")


def _rotary_tables(config: ModelConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cos and sin [positions, rotary_dim / 2], the reference's own."""
    import torch

    from persimmon.model import rotary_tables

    cos, sin = rotary_tables(config, torch.arange(config.max_positions))
    return cos.contiguous().numpy(), sin.contiguous().numpy()
