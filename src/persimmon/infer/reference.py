"""The reference decoder: `PersimmonModel` behind the interface that every engine offers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.infer.block_cache import PagedReference
from persimmon.infer.decoder import Chunk, Logits, check_token_ids
from persimmon.infer.identity import fingerprint
from persimmon.infer.kv_cache import CacheBatch, KVCache
from persimmon.model import PersimmonModel

MAX_STEP_TOKENS = 1_024
"""Tokens in one forward pass; longer prompts run in several.

It bounds the memory: on a CPU the attention mask of the last step of 16,384 positions takes 64 MiB in float32, as
much as the MLP hidden of the 8B.
"""


@dataclass(frozen=True)
class _Part:
    """Tokens start .. end of a chunk, run in one step."""

    chunk: int
    start: int
    end: int


class ReferenceDecoder:
    """Runs a PersimmonModel in eval mode on the device and in the precision of its parameters.

    Logits of a token do not depend on the chunking or on what else is in the call beyond the rounding of PyTorch's
    matrix products, whose order of summation may change with the number of rows (about 1e-6 relative in float32).
    `exact_top` is accepted and all logits are exact.
    """

    name = "reference"

    def __init__(self, model: PersimmonModel, *, max_step_tokens: int = MAX_STEP_TOKENS) -> None:
        self._model = model.eval()
        self._max_step_tokens = max_step_tokens
        weight = model.embed_tokens.weight
        self._dtype, self._device = weight.dtype, weight.device

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._model.config

    @property
    def model(self) -> PersimmonModel:
        """The model that runs."""
        return self._model

    def new_sequence(self, capacity: int) -> KVCache:
        """An empty sequence for up to `capacity` tokens; ContextLengthError beyond max_positions."""
        return KVCache(self.config, capacity, dtype=self._dtype, device=self._device)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """See infer.prompt_file."""
        weights = ((name, _flat_bytes(parameter)) for name, parameter in self._model.named_parameters())
        return {
            "engine": self.name,
            "weights": fingerprint(self.config, weights),
            "rotary_precision": self.config.rotary_precision,
            "kv_dtype": str(self._dtype).removeprefix("torch."),
        }

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.config.num_layers * self.config.hidden_size * self._dtype.itemsize

    def paged(self, num_blocks: int, block_size: int) -> PagedReference:
        """The same model over a cache of blocks, for continuous batching (see infer.paged)."""
        return PagedReference(self._model, num_blocks, block_size)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its sequence; its float32 logits: None, [V] or [T, V] (see infer.decoder)."""
        del exact_top  # permission to do less, which this engine does not use
        self._check(chunks)
        results = [self._room_for_logits(chunk) for chunk in chunks]
        for step in _steps([len(chunk.token_ids) for chunk in chunks], self._max_step_tokens):
            self._run(chunks, step, results)
        return results

    def _check(self, chunks: Sequence[Chunk]) -> None:
        """Refuse a call before it changes anything."""
        caches = [self._cache(chunk) for chunk in chunks]
        if len({id(cache) for cache in caches}) != len(caches):
            raise InputError("a sequence appears twice in one call")
        for chunk in chunks:
            check_token_ids("a chunk", chunk.token_ids, self.config.vocab_size)
        for cache, chunk in zip(caches, chunks, strict=True):
            cache.reserve(len(chunk.token_ids))

    def _cache(self, chunk: Chunk) -> KVCache:
        if not isinstance(chunk.sequence, KVCache):
            raise InputError(f"the sequence belongs to another decoder: {type(chunk.sequence).__name__}")
        return chunk.sequence

    def _room_for_logits(self, chunk: Chunk) -> Logits | None:
        if chunk.logits == "none":
            return None
        shape = (len(chunk.token_ids), self.config.vocab_size) if chunk.logits == "all" else self.config.vocab_size
        return np.empty(shape, np.float32)

    def _run(self, chunks: Sequence[Chunk], step: Sequence[_Part], results: Sequence[Logits | None]) -> None:
        """One forward pass over parts of the chunks laid end to end; fills in the logits they ask for."""
        ids = [chunks[part.chunk].token_ids[part.start : part.end] for part in step]
        cache = CacheBatch([self._cache(chunks[part.chunk]) for part in step], [len(part) for part in ids])
        row = torch.tensor([i for part in ids for i in part], device=self._device)[None]
        hidden = self._model.features(row, cache=cache)[0]  # [T, H]
        wanted: list[int] = []  # rows of `hidden`
        targets: list[Logits] = []  # views of the results, one per stretch of wanted rows
        offset = 0
        for part in step:
            chunk, result, size = chunks[part.chunk], results[part.chunk], part.end - part.start
            if result is not None and chunk.logits == "all":
                wanted += range(offset, offset + size)
                targets.append(result[part.start : part.end])
            elif result is not None and part.end == len(chunk.token_ids):
                wanted.append(offset + size - 1)
                targets.append(result[None])
            offset += size
        if wanted:
            self._write_logits(hidden[torch.tensor(wanted, device=self._device)], targets)

    def _write_logits(self, hidden: Tensor, targets: Sequence[Logits]) -> None:
        """The head over hidden [rows, H], dealt out to the targets in order."""
        logits = self._model.lm_head(hidden).float().cpu().numpy()
        row = 0
        for target in targets:
            target[:] = logits[row : row + len(target)]
            row += len(target)


def _flat_bytes(weight: Tensor) -> NDArray[np.uint8]:
    return weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _steps(sizes: Sequence[int], limit: int) -> Iterator[list[_Part]]:
    """Cut chunks of these sizes, in order, into steps of at most `limit` tokens."""
    step: list[_Part] = []
    room = limit
    for chunk, size in enumerate(sizes):
        start = 0
        while start < size:
            end = min(size, start + room)
            step.append(_Part(chunk, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield step
                step, room = [], limit
    if step:
        yield step
