"""The CPU engine's Decoder: Python checks what it is given, one native call does the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, ContextLengthError, InputError, UnavailableError
from persimmon.fast.cpu.formats import Format, why_unfit
from persimmon.fast.cpu.memory import GIB, kv_bytes_per_token
from persimmon.fast.cpu.native_module import native
from persimmon.infer.decoder import Chunk, Logits
from persimmon.machine import cpu_threads, memory_available

KV_DTYPES = ("auto", "float32", "int8")

DEFAULT_MARGIN = 2.0
"""Standard deviations: misses about 0.2% of the active neurons of a layer, those with the smallest activations."""


class CpuSequence:
    """One sequence's keys and values in native memory."""

    def __init__(self, cache: Any, capacity: int) -> None:
        self._cache = cache
        self._capacity = capacity
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens whose keys and values are stored."""
        return 0 if self._closed else int(self._cache.length)

    @property
    def capacity(self) -> int:
        """Most tokens it can hold."""
        return self._capacity

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate {self.length} stored tokens to {length}")
        self._cache.length = length

    def close(self) -> None:
        """Give the memory back."""
        self._closed = True
        self._cache.close()

    def check_room(self, num_tokens: int) -> None:
        """ContextLengthError unless that many more tokens fit; InputError when closed."""
        if self._closed:
            raise InputError("the sequence is closed")
        if self.length + num_tokens > self._capacity:
            raise ContextLengthError(
                f"{num_tokens} more tokens do not fit: {self.length} of {self._capacity} positions are taken"
            )

    @property
    def cache(self) -> Any:
        """The native cache."""
        return self._cache


class CpuDecoder:
    """Runs packed or plain weights with the native kernels.

    The logits of a token are the same to the last bit for every number of threads, every instruction set, every cut of
    the prompt into chunks and whatever else is in the call: all sums have one fixed order.
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
    ) -> None:
        """`arrays` as in formats.py. sparsity_margin: see docs/sparsity.md; `inf` skips nothing that is not zero.

        audit_every: recompute one decoded token in this many without skipping, and count what was missed; 0 never.
        isa: instruction set, `auto` the best of this processor.
        """
        _check_options(threads, kv_dtype, sparsity_margin, audit_every, isa)
        self._config, self._form = config, form
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
        """Per layer since the last reset: tokens, candidates, active; audited tokens, their active and missed
        neurons, and squared norms of the output's error and of the output.
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
        needed, free = capacity * kv_bytes_per_token(self._config, self._kv_dtype), memory_available()
        if free is not None and needed > free:
            raise UnavailableError(
                f"keys and values of {capacity} tokens need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: "
                "use a shorter context" + ("" if self._kv_dtype == "int8" else " or int8 keys and values")
            )
        return CpuSequence(self._model.new_cache(capacity, self._kv_dtype == "int8"), capacity)

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its sequence; its float32 logits: None, [V] or [T, V] (see infer.decoder)."""
        sequences = self._check(chunks)
        if not chunks:
            return []
        calls, wanted = [], 0
        for sequence, chunk in zip(sequences, chunks, strict=True):
            rows = {"none": 0, "last": 1, "all": len(chunk.token_ids)}[chunk.logits]
            calls.append((sequence.cache, np.asarray(chunk.token_ids, np.int32), rows))
            wanted += rows
        logits = np.empty((wanted, self._config.vocab_size), np.float32)
        try:
            self._model.forward(calls, min(exact_top or 0, self._config.vocab_size), logits)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return _split(logits, chunks)

    def _check(self, chunks: Sequence[Chunk]) -> list[CpuSequence]:
        """Refuse a call before it changes anything."""
        sequences = []
        for chunk in chunks:
            if not isinstance(chunk.sequence, CpuSequence):
                raise InputError(f"the sequence belongs to another decoder: {type(chunk.sequence).__name__}")
            sequences.append(chunk.sequence)
        if len({id(sequence) for sequence in sequences}) != len(sequences):
            raise InputError("a sequence appears twice in one call")
        for chunk in chunks:
            ids, limit = chunk.token_ids, self._config.vocab_size
            if not len(ids):
                raise InputError("a chunk holds no tokens")
            low, high = min(ids), max(ids)
            if low < 0 or high >= limit:
                raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {limit}")
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.check_room(len(chunk.token_ids))
        return sequences


def _check_options(threads: int | None, kv_dtype: str, margin: float, audit_every: int, isa: str) -> None:
    if threads is not None and threads < 1:
        raise InputError(f"threads must be 1 or more, got {threads}")
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


def _split(logits: Logits, chunks: Sequence[Chunk]) -> list[Logits | None]:
    """One result per chunk, views of the rows computed for it."""
    results: list[Logits | None] = []
    row = 0
    for chunk in chunks:
        if chunk.logits == "none":
            results.append(None)
        elif chunk.logits == "last":
            results.append(logits[row])
            row += 1
        else:
            results.append(logits[row : row + len(chunk.token_ids)])
            row += len(chunk.token_ids)
    return results
