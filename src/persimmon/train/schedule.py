"""Learning-rate schedules: pure functions of the share of the run that is done."""

from __future__ import annotations

import math

from persimmon.errors import ConfigError


def warmup_stable_decay(progress: float, *, warmup: float, decay: float, floor: float = 0.0) -> float:
    """Multiplier in [0, 1]: rises linearly over the first `warmup`, stays 1, falls to `floor` over the last `decay`.

    progress: share of the run's tokens seen before this step, in [0, 1]; warmup and decay: shares of the run that
    together are at most 1, else ConfigError.
    """
    _check(warmup, decay, floor)
    if progress < warmup:
        return _rise(progress, warmup)
    remaining = max(0.0, 1.0 - progress)
    if remaining < decay:
        return floor + (1.0 - floor) * remaining / decay
    return 1.0


def cosine(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """Multiplier in [0, 1]: linear rise over the first `warmup`, then half a cosine down to `floor`."""
    _check(warmup, 0.0, floor)
    if progress < warmup:
        return _rise(progress, warmup)
    done = min(1.0, (progress - warmup) / (1.0 - warmup)) if warmup < 1.0 else 1.0
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def _rise(progress: float, warmup: float) -> float:
    """From a thousandth, so that the first step is not lost, to 1 at the end of the warm-up."""
    return (progress + 1e-3 * warmup) / (warmup * 1.001)


def _check(warmup: float, decay: float, floor: float) -> None:
    if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1 + 1e-9):
        raise ConfigError(f"warmup {warmup:g} and decay {decay:g} must be shares that add up to at most 1")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor must be in [0, 1], got {floor:g}")
