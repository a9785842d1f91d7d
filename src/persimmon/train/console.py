"""What a person sees of a running training: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ConsoleReport:
    """Receives every step's metrics. Picklable until first called, so that it can travel to a worker process."""

    every: int = 20
    quiet: bool = False
    _progress: Any = field(default=None, repr=False)
    _task: Any = field(default=None, repr=False)

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one step."""
        if "held_out" in row:
            scores = ", ".join(f"{name} {value}" for name, value in row["held_out"].items())
            self._print(f"step {row['step']}: held out: {scores}")
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._advance(row)
        elif row["step"] % self.every == 0 or row["tokens"] >= row["of_tokens"]:
            self._print(
                f"step {row['step']}  {row['tokens']:,} of {row['of_tokens']:,} tokens  loss {row['loss']:.4f}  "
                f"{row['tokens_per_second']:,.0f} tok/s"
            )

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _advance(self, row: dict[str, Any]) -> None:
        if self._progress is None:
            self._start(row["of_tokens"])
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s"
        self._progress.update(self._task, completed=row["tokens"], description=text)
        if row["tokens"] >= row["of_tokens"]:
            self._progress.stop()

    def _start(self, total_tokens: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("starting", total=total_tokens)
