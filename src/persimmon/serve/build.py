"""The engine that a server's process runs, from settings that can be sent to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from persimmon.infer.engine import STEP_TOKENS, Engine, num_blocks_for

if TYPE_CHECKING:
    from persimmon.infer.decoder import Decoder

BLOCK_SIZE = 16
"""Tokens of a cache block."""

_CACHE_SHARE = 0.5
"""Share of the free memory, after loading, that the cache may take when nothing is said."""


@dataclass(frozen=True)
class EngineSettings:
    """What to load and how much to run at once. Call it to build the engine."""

    model: str
    load_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `persimmon.load`."""
    max_running: int = 16
    step_tokens: int = STEP_TOKENS
    cache_tokens: int | None = None
    """Tokens that the cache holds; None takes what fits, at most every running request's whole context."""

    def __call__(self) -> Engine:
        """Load the model and make the engine."""
        from persimmon.api import load
        from persimmon.infer.paged import page

        model = load(self.model, **self.load_options)
        blocks = self._num_blocks(model.decoder, model.context)
        return Engine(
            page(model.decoder, blocks, BLOCK_SIZE, max_sequences=self.max_running),
            model.tokenizer,
            max_running=self.max_running,
            step_tokens=self.step_tokens,
            context=model.context,
        )

    def _num_blocks(self, decoder: Decoder, context: int) -> int:
        if self.cache_tokens is not None:
            return max(1, -(-self.cache_tokens // BLOCK_SIZE))
        from persimmon.infer.paged import Pageable
        from persimmon.machine import memory_available

        config = decoder.config
        # Keys and values of all layers; what a decoder does not say is taken for four bytes each.
        token_bytes = (
            decoder.token_bytes if isinstance(decoder, Pageable) else 8 * config.num_layers * config.hidden_size
        )
        budget = getattr(decoder, "cache_budget", None)  # of an engine whose cache is not in the host's memory
        if budget is None:
            budget = int((memory_available() or 4 << 30) * _CACHE_SHARE)
        return num_blocks_for(context, self.max_running, token_bytes, budget, BLOCK_SIZE)
