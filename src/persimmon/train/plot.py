"""The curves of a run as one picture: loss, held-out bits per byte, share of zeros per layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from persimmon.errors import NotFoundError
from persimmon.figures import load_pyplot, save_figure


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`."""
    if not path.is_file():
        raise NotFoundError(f"no metrics at {path}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, started at the first value."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else weight * result[-1] + (1 - weight) * value)
    return result


def plot_run(metrics: Path, picture: Path) -> None:
    """Draw `metrics.jsonl` into a PNG or SVG. Needs the `train` extra."""
    pyplot = load_pyplot("train")
    rows = read_metrics(metrics)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    millions = [row["tokens"] / 1e6 for row in rows]
    losses = [row["loss"] for row in rows]
    left.plot(millions, losses, color="#c8c8c8", linewidth=0.6)
    left.plot(millions, smooth(losses), color="#c2410c", linewidth=1.6)
    left.set(title="training loss", xlabel="million tokens", ylabel="nats per token")
    scored = [row for row in rows if row.get("held_out")]
    for name in scored[0]["held_out"] if scored else []:
        points = [(row["tokens"] / 1e6, row["held_out"][name]) for row in scored]
        middle.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    middle.set(title="held out", xlabel="million tokens")
    counted = [row for row in rows if "zeros" in row]
    for layer in range(len(counted[0]["zeros"]) if counted else 0):
        shares = smooth([row["zeros"][layer] for row in counted], 0.8)
        right.plot([row["tokens"] / 1e6 for row in counted], shares, linewidth=1.2, label=f"layer {layer + 1}")
    right.set(title="zeros after the squared ReLU", xlabel="million tokens", ylim=(0, 1))
    for axis in (middle, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
    save_figure(figure, picture, dpi=110)
    pyplot.close(figure)
