"""The zeros of a model on a text: how many, how steady from token to token, and the bytes that skipping them saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from persimmon.checkpoints.shards import ProgressReport, no_progress
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import cold_bytes, hot_bytes
from persimmon.figures import load_pyplot, save_figure
from persimmon.model import PersimmonModel

WINDOW = 512  # tokens that are read as one sequence


@dataclass(frozen=True)
class LayerSparsity:
    """One layer on the text; shares from 0 to 1."""

    zeros: float
    """Of the MLP's neurons, mean over the tokens."""
    overlap: float
    """Of a token's active neurons, those that were active for the token before; chance would give 1 - zeros."""


class _Counter:
    """Sums over all tokens, fed by the model's observer."""

    def __init__(self, config: ModelConfig) -> None:
        self._neurons = config.intermediate_size
        self._active = [0] * config.num_layers
        self._followers = [0] * config.num_layers  # active neurons of tokens that have one before them
        self._kept = [0] * config.num_layers  # of those, active for the token before too
        self.tokens = 0

    def observe(self, layer: int, activations: Tensor) -> None:
        """Count relu(pre-activation) [1, T, F] of a layer."""
        active = activations[0] > 0
        self._active[layer] += int(active.sum())
        self._followers[layer] += int(active[1:].sum())
        self._kept[layer] += int((active[1:] & active[:-1]).sum())

    def results(self) -> list[LayerSparsity]:
        """Per layer."""
        possible = self.tokens * self._neurons
        return [
            LayerSparsity(1 - active / possible, kept / followers if followers else 0.0)
            for active, followers, kept in zip(self._active, self._followers, self._kept, strict=True)
        ]


@torch.inference_mode()
def measure(
    model: PersimmonModel, token_ids: Sequence[int], progress: ProgressReport = no_progress
) -> list[LayerSparsity]:
    """Count the zeros of every layer, over windows of 512 tokens that each begin anew.

    progress: called with (tokens done, tokens in all). Raises InputError for an empty text.
    """
    if not token_ids:
        raise InputError("the text holds no tokens")
    window = min(WINDOW, model.config.max_positions)
    counter = _Counter(model.config)
    for start in range(0, len(token_ids), window):
        piece = torch.tensor([token_ids[start : start + window]])
        model.features(piece, observe=counter.observe)
        counter.tokens += piece.shape[1]
        progress(counter.tokens, len(token_ids))
    return counter.results()


@dataclass(frozen=True)
class Savings:
    """Bytes of MLP matrices that one decoded token reads in all layers."""

    dense: int
    skipped: int
    """Of them, those that belong to neurons that are zero."""


def savings(config: ModelConfig, layers: Sequence[LayerSparsity]) -> dict[str, Savings]:
    """What skipping saves at most per decoded token, by format.

    bfloat16: the down projection's rows. p44: the whole cold record, rest row and down row; what its margin reads
    beyond the active neurons is not taken off.
    """
    zeros = sum(layer.zeros for layer in layers) * config.intermediate_size
    neurons = len(layers) * config.intermediate_size
    hidden = config.hidden_size
    return {
        "bfloat16": Savings(4 * hidden * neurons, round(2 * hidden * zeros)),
        "p44": Savings((hot_bytes(config) + cold_bytes(config)) * neurons, round(cold_bytes(config) * zeros)),
    }


def plot(layers: Sequence[LayerSparsity], picture: Path, title: str) -> None:
    """Draw zeros and overlap per layer into a PNG or SVG. Needs the `train` extra."""
    pyplot = load_pyplot("train")
    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    numbers = list(range(1, len(layers) + 1))
    axis.bar(numbers, [100 * layer.zeros for layer in layers], color="#c2410c", label="zeros after the squared ReLU")
    axis.plot(numbers, [100 * layer.overlap for layer in layers], "o-", color="#1c1917", markersize=4,
              label="active neurons kept from the token before")  # fmt: skip
    axis.set(title=title, xlabel="layer", ylabel="percent", ylim=(0, 100))
    axis.locator_params(axis="x", integer=True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=2, frameon=False, fontsize=9)
    save_figure(figure, picture, dpi=140)
    pyplot.close(figure)
