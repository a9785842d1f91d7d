"""Learning-rate schedules: pure functions of the share of the run that is done."""

from __future__ import annotations

import math


def warmup_stable_decay(progress: float, *, warmup: float, decay: float, floor: float = 0.0) -> float:
    """Multiplier in [0, 1]: rises linearly over the first `warmup`, stays 1, falls to `floor` over the last `decay`.

    progress: share of the run's tokens seen before this step, in [0, 1]; warmup and decay: shares of the run.
    """
    if warmup > 0 and progress < warmup:
        return (progress + 1e-3 * warmup) / (warmup * 1.001)
    remaining = max(0.0, 1.0 - progress)
    if decay > 0 and remaining < decay:
        return floor + (1.0 - floor) * remaining / decay
    return 1.0


def cosine(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """Multiplier in [0, 1]: linear rise over the first `warmup`, then half a cosine down to `floor`."""
    if warmup > 0 and progress < warmup:
        return (progress + 1e-3 * warmup) / (warmup * 1.001)
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
