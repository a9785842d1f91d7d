"""The CUDA engine's Decoder: sequences over one pool of blocks, checked here and run by `Runner`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from persimmon.config import ModelConfig
from persimmon.errors import ContextLengthError, InputError, UnavailableError
from persimmon.fast.cuda.buffers import MOST_STEPS
from persimmon.fast.cuda.choice import DENSE, KernelTable
from persimmon.fast.cuda.graphs import BUCKETS, Capture, cuda_capture
from persimmon.fast.cuda.kernels.sampling import CANDIDATES
from persimmon.fast.cuda.network import Network
from persimmon.fast.cuda.paged import PagedCuda
from persimmon.fast.cuda.plan import RESERVE_BYTES, device_kv_bytes_per_token, scratch_bytes
from persimmon.fast.cuda.pool import CACHE_DTYPES, FreeBlocks, Pool
from persimmon.fast.cuda.runner import MAX_PASS_TOKENS, Decoded, Piece, Runner
from persimmon.fast.cuda.weights import Weights
from persimmon.infer.decoder import Chunk, Logits
from persimmon.infer.drawing import Draw, Picked
from persimmon.infer.params import SamplingParams
from persimmon.infer.stored_sequence import StoredSequence, own_sequences

BLOCK_SIZE = 64
"""Tokens of a block of the decoder's own sequences."""


class CudaSequence(StoredSequence):
    """One sequence: blocks of its decoder's pool, taken as it grows and given back with the object at the latest.

    Those of forgotten tokens stay for what comes next.
    """

    def __init__(self, capacity: int, free: FreeBlocks, block_size: int) -> None:
        super().__init__(capacity)
        self._free, self._block_size = free, block_size
        self.blocks: list[int] = []
        self._give_back = weakref.finalize(self, _give_back, free, self.blocks)

    def close(self) -> None:
        """Give the blocks back."""
        super().close()
        self._give_back()

    def missing_blocks(self, num_tokens: int) -> int:
        """Blocks to take for that many more tokens. ContextLengthError when they do not fit, InputError when closed."""
        self.check_room(num_tokens)
        return max(0, -(-(self._length + num_tokens) // self._block_size) - len(self.blocks))

    def grow(self, count: int) -> None:
        """Take that many blocks; UnavailableError when the pool has no more."""
        if count:
            self.blocks += self._free.take(count, self.blocks[-1] if self.blocks else None)


def _give_back(free: FreeBlocks, blocks: list[int]) -> None:
    free.give_back(blocks)
    blocks.clear()


class CudaDecoder:
    """Runs a model's weights with the Triton kernels, on a GPU or, for tests, in Triton's interpreter on the CPU.

    Logits of a token do not depend on what the other rows of a call hold. They do on the number of tokens in a call,
    which decides between kernels. Of plain weights, up to 64 tokens, only the order of float32 sums differs; logits are
    float32 sums at any number. Quantized weights are exact for one token and rounded to the activations' type for more,
    and passes of more than 64 tokens round the up projection once more, before its bias.
    """

    name = "cuda"

    def __init__(
        self, weights: Weights, *, context: int | None = None, cache_tokens: int | None = None, kv_dtype: str = "auto",
        table: KernelTable = DENSE, sparsity_margin: float = math.inf, capture: Capture | None = None,
        max_pass_tokens: int = MAX_PASS_TOKENS,
    ) -> None:  # fmt: skip
        """Keys and values of `cache_tokens` tokens (default `context`, default all positions) are allocated here.

        context: longest sequence. kv_dtype: auto (the weights' activations), float32, bfloat16, int8 or fp8.
        sparsity_margin: see docs/sparsity.md; counts where `table` lets p44 run sparse.
        capture: how steps are recorded; default CUDA graphs on a GPU, nothing elsewhere.
        """
        if math.isnan(sparsity_margin) or sparsity_margin < 0:
            raise InputError(f"sparsity_margin must be from 0 to inf, got {sparsity_margin}")
        if kv_dtype not in ("auto", *CACHE_DTYPES):
            known = ", ".join(CACHE_DTYPES)
            raise InputError(f"kv_dtype of the cuda engine must be auto or one of {known}, got {kv_dtype!r}")
        config, device = weights.config, weights.device
        self.context = min(context or config.max_positions, config.max_positions)
        self._network = Network(weights, table, sparsity_margin)
        self._kv_dtype = kv_dtype if kv_dtype != "auto" else str(weights.dtype).removeprefix("torch.")
        self._capture = capture or (cuda_capture(device) if device.type == "cuda" else None)
        self._max_pass_tokens = max_pass_tokens
        self._num_blocks = -(-(cache_tokens or self.context) // BLOCK_SIZE)
        self._free = FreeBlocks(self._num_blocks)
        self._own: Runner | None = None
        self._warm = False

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._network.weights.config

    @property
    def weights(self) -> Weights:
        """What it runs on."""
        return self._network.weights

    @property
    def kv_dtype(self) -> str:
        """How keys and values are stored."""
        return self._kv_dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        return device_kv_bytes_per_token(self.config, self._kv_dtype)

    @property
    def cache_budget(self) -> int | None:
        """Bytes of the GPU that a cache of blocks may take now, what a pass needs kept free; None without a GPU."""
        if self.weights.device.type != "cuda":
            return None
        if not self._warm:
            self._warm_up()
            torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.weights.device)
        needed = scratch_bytes(self.config, self.weights.format, self.context, self._max_pass_tokens)
        return max(0, free - needed - RESERVE_BYTES // 2)

    def new_sequence(self, capacity: int) -> CudaSequence:
        """An empty sequence for up to `capacity` tokens.

        Raises ContextLengthError beyond max_positions, UnavailableError beyond what the cache was planned for.
        """
        limit = self.config.max_positions
        if not 1 <= capacity <= limit:
            raise ContextLengthError(f"a sequence of {capacity} tokens: the model has 1 to {limit}")
        if capacity > self._num_blocks * BLOCK_SIZE:
            raise UnavailableError(
                f"a sequence of {capacity} tokens: the cache was planned for {self._num_blocks * BLOCK_SIZE}; load "
                "with a larger context, or use int8 keys and values"
            )
        return CudaSequence(capacity, self._free, BLOCK_SIZE)

    def forward(self, chunks: Sequence[Chunk], *, exact_top: int | None = None) -> list[Logits | None]:
        """Append each chunk to its sequence; its float32 logits: None, [V] or [T, V] (see infer.decoder)."""
        del exact_top  # all logits are exact
        return cast(list[Logits | None], self.draw(chunks, [None] * len(chunks), np.array([], np.int64)))

    def draw(
        self, chunks: Sequence[Chunk], draws: Sequence[Draw | None], banned: NDArray[np.int64]
    ) -> list[Picked | None]:
        """The same, but the token where a chunk has a draw: see infer/drawing.py."""
        sequences = self._check(chunks)
        pieces = [
            Piece(sequence.blocks, sequence.length, chunk.token_ids, chunk.logits)
            for sequence, chunk in zip(sequences, chunks, strict=True)
        ]
        results = self._runner().draw(pieces, draws, banned)
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.advance(len(chunk.token_ids))
        return results

    def decode(
        self, sequences: Sequence[CudaSequence], token_ids: Sequence[int], params: Sequence[SamplingParams],
        num_tokens: int, banned: Sequence[int] = (),
    ) -> Decoded:  # fmt: skip
        """Append a token to each sequence and `num_tokens` - 1 of those drawn after it, all on the device.

        The last drawn token is not stored yet: it is the next call's. params: see `Runner.decode`; ends of texts are
        for the caller to find in what comes back. InputError for more than 64 sequences, and for a top_k that the
        device's sampler cannot hold.
        """
        if not 1 <= num_tokens <= MOST_STEPS:
            raise InputError(f"num_tokens must be from 1 to {MOST_STEPS}, got {num_tokens}")
        if len(sequences) > BUCKETS[-1]:
            raise InputError(f"decode takes at most {BUCKETS[-1]} sequences, got {len(sequences)}")
        if not len(sequences) == len(token_ids) == len(params):
            counts = f"{len(sequences)} sequences, {len(token_ids)} token ids and {len(params)} params"
            raise InputError(f"decode takes one of each per row, got {counts}")
        for wanted in params:
            if CANDIDATES < wanted.top_k < self.config.vocab_size and wanted.temperature > 0:
                raise InputError(f"top_k on the device must be at most {CANDIDATES}, got {wanted.top_k}")
        chunks = [Chunk(sequence, [token]) for sequence, token in zip(sequences, token_ids, strict=True)]
        self._check(chunks, num_tokens)
        pieces = [Piece(s.blocks, s.length, [t], "last") for s, t in zip(sequences, token_ids, strict=True)]
        drawn = self._runner().decode(pieces, params, num_tokens, banned)
        for sequence in sequences:
            sequence.advance(num_tokens)
        return drawn

    def paged(self, num_blocks: int, block_size: int) -> PagedCuda:
        """The same weights over a cache of blocks of its own, for continuous batching (see infer.paged)."""
        if num_blocks < 1 or block_size < 1:
            raise InputError(f"num_blocks and block_size must be 1 or more, got {num_blocks} and {block_size}")
        pool = Pool(self.config, num_blocks, block_size, self._kv_dtype, self.weights.device)
        return PagedCuda(self._make_runner(pool))

    def _make_runner(self, pool: Pool) -> Runner:
        return Runner(self._network, pool, capture=self._capture, max_pass_tokens=self._max_pass_tokens)

    def _warm_up(self) -> None:
        """A short prompt and a batch's step over one block of its own: kernels and the libraries' workspaces are in the
        GPU's memory before anyone asks how much of it is free.
        """  # noqa: D205
        runner = Runner(self._network, Pool(self.config, 1, BLOCK_SIZE, self._kv_dtype, self.weights.device))
        for length in (min(32, self.config.max_positions), 1):
            runner.run([Piece([0], 0, [0] * length, "last")])
        self._warm = True

    def _runner(self) -> Runner:
        """Over the decoder's own pool, which a server that only uses `paged` never allocates."""
        if self._own is None:
            pool = Pool(self.config, self._num_blocks, BLOCK_SIZE, self._kv_dtype, self.weights.device)
            self._own = self._make_runner(pool)
        return self._own

    def _check(self, chunks: Sequence[Chunk], num_tokens: int | None = None) -> list[CudaSequence]:
        """Refuse a call before it changes anything; take the blocks it needs (`num_tokens` each, or its chunk's)."""
        sequences = own_sequences(chunks, CudaSequence, self.config.vocab_size)
        wanted = [s.missing_blocks(num_tokens or len(c.token_ids)) for s, c in zip(sequences, chunks, strict=True)]
        if sum(wanted) > len(self._free):
            self._free.take(sum(wanted))  # raises, and says how many are missing
        for sequence, count in zip(sequences, wanted, strict=True):
            sequence.grow(count)
        return sequences
