"""Engines that fail on purpose."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from persimmon.infer.block_cache import PagedReference
from persimmon.infer.decoder import Logits
from persimmon.infer.engine import Engine
from persimmon.infer.paged import PagedChunk
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

POISON = 319


class Deadly(PagedReference):
    """Kills its process when a certain token is run; slow, so that there is time to interfere."""

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        if any(POISON in chunk.token_ids for chunk in chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().forward(chunks, exact_top=exact_top)


def build_deadly() -> Engine:
    return Engine(Deadly(tiny_model(max_positions=512), 128, 16), tiny_tokenizer(), max_running=8)


def build_broken() -> Engine:
    raise RuntimeError("no such weights")


class Hanging(Deadly):
    """Stops its process, as a deadlock would, when a certain token is run."""

    def forward(self, chunks: Sequence[PagedChunk], *, exact_top: int | None = None) -> list[Logits | None]:
        if any(POISON in chunk.token_ids for chunk in chunks):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(chunks, exact_top=exact_top)


def build_hanging() -> Engine:
    return Engine(Hanging(tiny_model(max_positions=512), 128, 16), tiny_tokenizer(), max_running=8)


def build_once(mark: str) -> Engine:
    """Loads while the file is there, which this takes away; otherwise the process dies."""
    if not os.path.exists(mark):
        os.kill(os.getpid(), signal.SIGKILL)
    os.unlink(mark)
    return build_deadly()
