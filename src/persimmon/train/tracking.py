"""Where the numbers of a run go, and its speed: metrics.jsonl, TensorBoard, Weights & Biases when asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from persimmon.accounting import count_parameters
from persimmon.atomic import write_text
from persimmon.config import ModelConfig
from persimmon.errors import UnavailableError
from persimmon.train.parallel import World


class SpeedMeter:
    """Throughput, share of the measured peak (MFU) and time left."""

    def __init__(self, config: ModelConfig, world: World, dtype: torch.dtype, adapters: int = 0) -> None:
        """adapters: numbers that are trained beside a frozen model; 0: the model itself is trained."""
        weights = count_parameters(config).read_per_token
        # Of a frozen weight's six FLOPs the two that make its gradient are not done.
        self._per_token = 4 * weights + 6 * adapters if adapters else 6 * weights
        self._attention = 6 * config.hidden_size * config.num_layers
        self._peak = measured_peak(world.device, dtype) * world.size
        self._tokens_per_second: float | None = None

    def measure(self, tokens: int, squared_lengths: float, seconds: float, tokens_left: int) -> dict[str, Any]:
        """Entries of a step's row.

        FLOPs are those of `accounting.training_flops_per_token` by document lengths, less what frozen weights save.
        """
        flops = self._per_token * tokens + self._attention * squared_lengths
        speed, mean = tokens / seconds, self._tokens_per_second
        self._tokens_per_second = speed if mean is None else 0.95 * mean + 0.05 * speed
        return {
            "tokens_per_second": round(speed, 1),
            "mfu": round(flops / seconds / self._peak, 4),
            "eta_seconds": round(tokens_left / self._tokens_per_second),
        }


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of this process's best of five square matrix products, the denominator of MFU (tens of milliseconds)."""
    size = size * 8 if device.type == "cuda" else size
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            float((a @ a)[0, 0])
            best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)


class Tracker:
    """Writes every row in the main process; elsewhere it does nothing."""

    def __init__(self, directory: Path, step: int, world: World, wandb_project: str = "") -> None:
        self._directory, self._step, self._main = directory, step, world.is_main
        self._project = wandb_project
        self._stream: Any = None
        self._board: Any = None
        self._wandb: Any = None
        self._held: list[dict[str, Any]] = []

    def __enter__(self) -> Tracker:
        """Open the files; rows after the resumed step are dropped."""
        if not self._main:
            return self
        truncate_metrics(self._directory / "metrics.jsonl", self._step)
        self._stream = (self._directory / "metrics.jsonl").open("a")
        self._board = _tensorboard(self._directory / "tensorboard", self._step)
        if self._project:
            self._wandb = _wandb(self._project, self._directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is held, where the run fails, and close the files."""
        try:
            for row in self._held if kind is not None else ():
                self._add(row)
        finally:
            for thing, close in ((self._stream, "close"), (self._board, "close"), (self._wandb, "finish")):
                if thing is not None:
                    getattr(thing, close)()

    def hold(self, row: dict[str, Any]) -> None:
        """Keep a step's row until the next one is written: should the run fail before, it is wanted after all."""
        self._held.append(row)

    def write(self, row: dict[str, Any]) -> None:
        """Add a step's row, and forget those that are held."""
        self._held.clear()
        self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        if not self._main:
            return
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        values = flat_scalars(row)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, row["step"])
            if "sample" in row:
                self._board.add_text("sample", row["sample"], row["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=row["step"])


def flat_scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row under names like `zeros/layer_1`, `held_out/code`, `loss_by_position/0-2k`."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items() if isinstance(number, (int, float))}
        elif isinstance(value, list):
            for index, number in enumerate(value):
                label = f"{2 * index}-{2 * index + 2}k" if name == "loss_by_position" else f"layer_{index + 1}"
                if number is not None:
                    flat[f"{name}/{label}"] = number
        elif isinstance(value, (int, float)) and name not in ("step", "of_tokens"):
            flat[name] = value
    return flat


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer of event files, or None without the `train` extra; events after the resumed step are purged."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _wandb(project: str, directory: Path) -> Any:
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UnavailableError("wandb is set in the recipe but not installed: pip install wandb") from None
    return wandb.init(project=project, dir=str(directory), name=directory.name, resume="allow")


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step` (and a torn last line), so that a resumed run leaves one row per step."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))
