"""What the loop needs to know beside model and data: the `loop` section of every training recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from persimmon.errors import ConfigError
from persimmon.train.mesh import ParallelRecipe
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.schedule import cosine, warmup_stable_decay


@dataclass(frozen=True)
class ScheduleRecipe:
    """How the learning rates go over the run."""

    kind: str = "stable"
    """`stable`: warm-up, constant, linear decay; `cosine`: warm-up, then half a cosine."""
    warmup: float = 0.02
    """Share of the run's tokens."""
    decay: float = 0.5
    """Share of the run's tokens at its end (`stable` only)."""
    floor: float = 0.0
    """Where the decay ends, as a share of the top rates."""

    def __post_init__(self) -> None:
        if self.kind not in ("stable", "cosine"):
            raise ConfigError(f"schedule.kind must be stable or cosine, got {self.kind!r}")
        self.factor(0.0)

    def factor(self, progress: float) -> float:
        """The multiplier after `progress`, the share of the run's tokens already seen."""
        if self.kind == "cosine":
            return cosine(progress, warmup=self.warmup, floor=self.floor)
        return warmup_stable_decay(progress, warmup=self.warmup, decay=self.decay, floor=self.floor)


@dataclass(frozen=True)
class LoopRecipe:
    """What the loop needs to know beside model and data."""

    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    dtype: str = "float32"
    """Dtype of the matrix products: float32, or bfloat16 (autocast; weights and sums stay float32)."""
    sparsity_penalty: float = 0.0
    """Weight of the mean of relu(pre-activation) over layers, positions and neurons, added to the loss in nats."""
    sparsity_target: float = 1.0
    """Share of zeros at which a layer's penalty pauses and its biases are lifted instead (train/sparsity.py)."""
    sparsity_lift: float = 1.0
    """Size of one lift, as a multiple of the present rate of the vectors."""
    sparsity_start: float = 0.0
    """Share of the run's tokens before which zeros are only counted ..."""
    sparsity_end: float = 1.0
    """... and after which they are only counted again: neither penalty nor lifts."""
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    kernels: str = "auto"
    """`auto`: on CPUs the compiled training kernels (train/fused.py) where they are built; `plain`: PyTorch alone."""
    compile: bool = False
    """Whether the blocks are compiled (torch.compile): pays on GPUs after a minute's start."""
    activations: str = "all"
    """What a forward pass keeps for the backward pass: `all`; `selective` (attention and projections, the rest is
    recomputed); `none` (only what enters each block)."""
    micro_tokens: int = 8192
    """Most tokens of one forward pass of one process."""
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    """The newest ones that are kept ..."""
    keep_every: int = 0
    """... and a checkpoint every so many steps that is kept for good; 0: none."""
    log_every: int = 1
    """Steps between rows of the metrics; those of an evaluation or of trouble and the last are always written."""
    evaluate_every: int = 250
    """Steps between evaluations on held-out documents; 0: only at the end."""
    max_loss_jump: float = 3.0
    """A step whose loss exceeds the running mean by this many nats, or is not finite, is a spike."""
    on_spike: str = "stop"
    """`stop` the run before the update, or `skip` the step's update and go on."""
    max_skipped: int = 10
    """Spikes in a row after which the run stops all the same."""
    wandb: str = ""
    """Project on Weights & Biases to report to; empty: none. TensorBoard files are always written when it is there."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r} (float16 overflows in relu^2)")
        for name, choices in (
            ("activations", ("all", "selective", "none")),
            ("on_spike", ("stop", "skip")),
            ("kernels", ("auto", "plain")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.parallel.splits_weights and self.optimizer.state == "int8":
            raise ConfigError("optimizer.state int8 goes with neither parallel.shard nor parallel.tensor")
        if not 0 <= self.sparsity_start <= self.sparsity_end <= 1:
            raise ConfigError(
                "sparsity_start and sparsity_end must ascend within 0 and 1, "
                f"got {self.sparsity_start} and {self.sparsity_end}"
            )
        for name in ("micro_tokens", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
