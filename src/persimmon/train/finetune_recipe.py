"""The recipe of a fine-tuning run: what `persimmon finetune` reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from persimmon.checkpoints.adapters import LoraSettings
from persimmon.errors import ConfigError
from persimmon.train.loop import LoopRecipe
from persimmon.train.preference import PreferenceRecipe


@dataclass(frozen=True)
class ChatFiles:
    """Files of conversations, and how often each is seen per epoch."""

    files: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True)
class ReplayRecipe:
    """Rows of pretraining data mixed in, so that the model does not forget plain text."""

    data: str
    share: float = 0.1
    """Share of the rows of every step."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything about a fine-tuning run."""

    model: str
    """Directory or name of the model to start from; a quantized one (q8, q4) for QLoRA."""
    root: str
    """Folder of the conversation files."""
    output: str
    sources: dict[str, ChatFiles]
    lora: LoraSettings | None = None
    """Train adapters of this shape and freeze the model."""
    adapter: str | None = None
    """Go on with the adapter in this directory instead of a fresh one."""
    preference: PreferenceRecipe | None = None
    """Learn from preferences: the sources hold a prompt, a chosen and a rejected answer."""
    weights: str = "float32"
    """Type of a model that trains as a whole; bfloat16 needs loop.dtype bfloat16 and loop.optimizer.state int8, whose
    updates are rounded so that small ones count."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training (NEFTune; 5 is usual), 0 for none."""
    epochs: float = 2.0
    row_length: int = 1024
    batch_tokens: int = 8192
    held_out: float = 0.02
    on_error: str = "stop"
    """At a broken record or file: stop, or leave it out, count it and name it in `output`/dropped.jsonl."""
    replay: ReplayRecipe | None = None
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    seed: int = 0
    processes: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.batch_tokens % self.row_length:
            raise ConfigError(f"batch_tokens {self.batch_tokens} must be a multiple of row_length {self.row_length}")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"on_error must be stop or skip, got {self.on_error!r}")
        if self.epochs <= 0:
            raise ConfigError(f"epochs must be positive, got {self.epochs}")
        if not self.neftune_alpha >= 0:
            raise ConfigError(f"neftune_alpha must not be negative, got {self.neftune_alpha}")
        if self.lora is not None and self.adapter is not None:
            raise ConfigError("lora and adapter exclude each other: an adapter that goes on has its shape already")
        if self.trains_adapters and self.loop.optimizer.matrices == "muon":
            raise ConfigError("adapters train with adamw: set loop.optimizer.matrices")
        if self.weights not in ("float32", "bfloat16"):
            raise ConfigError(f"weights must be float32 or bfloat16, got {self.weights!r}")
        rounds_well = self.loop.dtype == "bfloat16" and self.loop.optimizer.state == "int8"
        if self.weights == "bfloat16" and not self.trains_adapters and not rounds_well:
            raise ConfigError("weights bfloat16 need loop.dtype bfloat16 and loop.optimizer.state int8")
        if self.preference is not None and (self.replay is not None or self.neftune_alpha):
            raise ConfigError("preference goes with neither replay nor neftune_alpha")

    @property
    def trains_adapters(self) -> bool:
        """Whether the model itself stays frozen."""
        return self.lora is not None or self.adapter is not None
