"""What a measurement is compared with: bytes and operations of a step, and the ceilings they imply. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from persimmon.accounting import count_parameters
from persimmon.config import ModelConfig


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decoding step of a batch reads."""

    weights_dense: int
    """Every matrix once, whatever the batch."""
    weights_skipped: int
    """Of them, rows that belong to neurons no row of the batch has active."""
    keys_and_values: int

    @property
    def total(self) -> int:
        """What is really read."""
        return self.weights_dense - self.weights_skipped + self.keys_and_values

    @property
    def dense(self) -> int:
        """What would be read if nothing were skipped."""
        return self.weights_dense + self.keys_and_values


def ceiling_tokens_per_second(step: StepBytes, batch: int, bandwidth: float) -> float:
    """Tokens per second at `bandwidth` bytes per second if nothing but reading took time."""
    return batch * bandwidth / step.total


def union_of_active(active: float, tokens: int) -> float:
    """Share of neurons that any of `tokens` independent tokens has active."""
    return 1.0 - (1.0 - active) ** tokens


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of reading a prompt whose last logits alone are wanted: products and causal attention."""
    count = count_parameters(config)
    matrices = count.read_per_token - config.vocab_size * config.hidden_size
    attention = 2 * tokens * (tokens + 1) * config.hidden_size * config.num_layers
    return 2 * matrices * tokens + attention + 2 * config.vocab_size * config.hidden_size


def percent(achieved: float, ceiling: float) -> float:
    """Share in percent, one decimal."""
    return round(100.0 * achieved / ceiling, 1) if ceiling else 0.0
