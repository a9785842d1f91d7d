"""`persimmon pretrain RECIPE --plan`: what a run needs and how long it takes, before anything is started.

Arithmetic on the recipe. Memory is per device and by part, for the way this project trains: float32 weights, gradients
and optimizer states (split over the devices with FSDP2), products in bfloat16 on GPUs, the loss in chunks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from persimmon.accounting import count_parameters, training_flops_per_token
from persimmon.config import ModelConfig, preset
from persimmon.errors import ConfigError
from persimmon.train.hardware import Device
from persimmon.train.loss import CHUNK, gpu_chunk
from persimmon.train.memory_plan import optimizer_bytes, optimizer_kind
from persimmon.train.mesh import ParallelRecipe
from persimmon.train.pretrain import PretrainRecipe, plan_phases

USABLE = 0.92
"""Share of a device's memory that a plan fills: the rest goes to the driver, communication and fragmentation."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device by part. There is no key/value cache in training."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """With FSDP2: embedding and head, and two blocks with their gradients, whole in bfloat16 while they are used."""
    activations: float
    logits: float
    """One chunk of logits and their gradient, and the float32 gradient of the head."""
    checkpoint: float
    """Copy of weights and optimizer states while a checkpoint is written; 0 on GPUs, whose host holds it."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a run costs on some hardware."""

    parameters: int
    tokens: int
    steps: int
    devices: int
    device: Device
    memory: DeviceMemory
    flops_per_token: float
    """Mean over the phases; documents that fill their rows."""
    tokens_per_second: float
    remedies: tuple[str, ...]
    """Changes of which each alone makes it fit; empty when it fits."""

    @property
    def fits(self) -> bool:
        """Whether the parts fit into the usable memory."""
        return self.memory.total <= USABLE * self.device.memory_bytes

    @property
    def host_bytes(self) -> float:
        """The host's memory, per device, for the copy that a checkpoint is written from; 0 where it is the device's."""
        return 0.0 if self.device.is_host else self.memory.weights + self.memory.optimizer

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def days(self) -> float:
        """Of the whole run without interruptions."""
        return self.tokens / self.tokens_per_second / 86_400

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            **asdict(self), "memory_total": self.memory.total, "host_bytes": self.host_bytes, "fits": self.fits,
            "total_flops": self.total_flops, "days": self.days,
        }  # fmt: skip


def device_memory(recipe: PretrainRecipe, config: ModelConfig, devices: int, device: Device) -> DeviceMemory:
    """Bytes of every part on each of `devices`."""
    parallel, loop = recipe.loop.parallel, recipe.loop
    count = count_parameters(config)
    shards = devices // parallel.tensor if parallel.splits_weights else 1
    own = count.total / parallel.tensor / shards
    weights = 4 * own
    optimizer = optimizer_bytes(config, optimizer_kind(loop.optimizer), count.total) / parallel.tensor / shards
    ends, block = count.embedding + count.head, (count.attention + count.mlp) / config.num_layers
    low = device.bytes_per_activation
    gathered = low * (2 * ends + 4 * block) / parallel.tensor if parallel.splits_weights and shards > 1 else 0.0
    longest = max(phase.row_length for phase in recipe.phases)
    tokens = max(loop.micro_tokens, longest / parallel.context)
    per_token = _activations_per_token(config, loop.activations, parallel.tensor)
    chunk = CHUNK if device.is_host else gpu_chunk(config.vocab_size // parallel.tensor)
    logits = min(chunk, tokens) * config.vocab_size * (4 + 2 * low) + 4 * count.head
    return DeviceMemory(
        weights=weights, gradients=4 * own, optimizer=optimizer,
        gathered=gathered, activations=low * per_token * tokens, logits=logits / parallel.tensor,
        checkpoint=weights + optimizer if device.is_host else 0.0,
    )  # fmt: skip


def _activations_per_token(config: ModelConfig, kept: str, tensor: int) -> float:
    """Numbers kept per token for the backward pass (LoopRecipe.activations), and one block's while it is recomputed."""
    hidden, width, layers = config.hidden_size, config.intermediate_size, config.num_layers
    # Inputs of both norms and both projections into the block [4 H]; qkv [3 H], normed and rotated q and k [4 H],
    # attention's result [1 H]; relu and its square [2 F]. Heads and neurons are split by tensor parallelism.
    whole = 4 * hidden + (8 * hidden + 2 * width) / tensor
    if kept == "all":
        return layers * whole
    # Block input, and with `selective` qkv, attention's result, both projections back into the stream.
    part = hidden + (2 * hidden + 4 * hidden / tensor if kept == "selective" else 0)
    return layers * part + whole


def make_plan(recipe: PretrainRecipe, devices: int, device: Device) -> Plan:
    """The plan of a recipe. Raises ConfigError when the devices do not divide as the recipe says."""
    parallel = recipe.loop.parallel
    if devices % (parallel.tensor * parallel.context):
        raise ConfigError(
            f"{devices} devices do not divide by parallel.tensor {parallel.tensor} x parallel.context "
            f"{parallel.context}"
        )
    config = preset(recipe.model.preset, **recipe.model.changes)
    phases = plan_phases(recipe)
    weighted = [(p.num_steps * p.rows_per_step * p.row_length, p.row_length) for p in phases]
    tokens = sum(n for n, _ in weighted)
    flops = sum(n * training_flops_per_token(config, length) for n, length in weighted) / tokens
    plan = Plan(
        parameters=count_parameters(config).total, tokens=tokens, steps=sum(p.num_steps for p in phases),
        devices=devices, device=device, memory=device_memory(recipe, config, devices, device),
        flops_per_token=flops, tokens_per_second=devices * device.peak_flops * device.mfu / flops, remedies=(),
    )  # fmt: skip
    return plan if plan.fits else replace(plan, remedies=tuple(_remedies(recipe, config, devices, device)))


def _remedies(recipe: PretrainRecipe, config: ModelConfig, devices: int, device: Device) -> list[str]:
    """Single changes, and then all memory savers together, that bring the run into memory."""
    longest = max(phase.row_length for phase in recipe.phases)
    parallel = recipe.loop.parallel
    changes: list[tuple[str, dict[str, Any]]] = []
    if devices > 1 and not parallel.splits_weights:
        changes.append(("loop.parallel.shard=true", {"parallel": replace(parallel, shard=True)}))
    if recipe.loop.activations == "all":
        changes.append(("loop.activations=selective", {"activations": "selective"}))
    if recipe.loop.activations != "none":
        changes.append(("loop.activations=none", {"activations": "none"}))
    if recipe.loop.micro_tokens > longest:
        changes.append((f"loop.micro_tokens={longest}", {"micro_tokens": longest}))
    for name in ("context", "tensor"):
        for size in (2, 4, 8):
            if devices % size == 0 and parallel.tensor == parallel.context == 1:
                spread = ParallelRecipe(*((size, 1) if name == "tensor" else (1, size)), shard=True)
                micro = longest // size if name == "context" else longest
                setting = {"parallel": spread, "micro_tokens": micro}
                changes.append((f"loop.parallel.{name}={size} loop.micro_tokens={micro}", setting))
    every: dict[str, Any] = {"activations": "none", "micro_tokens": longest}
    if devices > 1:
        every["parallel"] = replace(parallel, shard=True)
    found = [text for text, change in changes if _fits(recipe, change, config, devices, device)]
    if not found and _fits(recipe, every, config, devices, device):
        found.append(f"loop.activations=none loop.micro_tokens={longest}" + " loop.parallel.shard=true" * (devices > 1))
    for more in (2, 4, 8, 16, 32, 64, 128, 256):
        if _fits(recipe, {"parallel": replace(parallel, shard=True)}, config, devices * more, device):
            found.append(f"{devices * more} x {device.name} with loop.parallel.shard=true")
            break
    return found


def _fits(recipe: PretrainRecipe, change: dict[str, Any], config: ModelConfig, devices: int, device: Device) -> bool:
    changed = replace(recipe, loop=replace(recipe.loop, **change))
    return device_memory(changed, config, devices, device).total <= USABLE * device.memory_bytes


def render(plan: Plan) -> str:
    """The plan as a page of text; 1 GB is 10^9 bytes."""
    memory, host = plan.memory, plan.host_bytes
    lines = [
        f"parameters        {plan.parameters:,}",
        f"tokens            {plan.tokens:,} in {plan.steps:,} steps",
        f"FLOPs             {plan.flops_per_token / 1e9:,.1f} G per token, {plan.total_flops:.2e} in all",
        f"hardware          {plan.devices} x {plan.device.name}: {plan.device.memory_bytes / 1e9:.0f} GB and "
        f"{plan.device.peak_flops / 1e12:,.3g} TFLOP/s each",
        "memory per device",
        *(f"  {name:<15} {value / 1e9:8.2f} GB" for name, value in asdict(memory).items()),
        "  key/value cache     none",
        f"  total           {memory.total / 1e9:8.2f} GB, {'fits' if plan.fits else 'does not fit'} "
        f"in {USABLE:.0%} of {plan.device.memory_bytes / 1e9:.0f} GB",
        *([f"host memory       {host / 1e9:.2f} GB per device while a checkpoint is written"] if host else []),
        f"speed             {plan.tokens_per_second:,.0f} tokens/s at {plan.device.mfu:.0%} of the peak",
        f"  assumption      {plan.device.mfu_source}",
        f"time              {plan.days:,.1f} days",
    ]
    if not plan.fits:
        lines += ["to make it fit, any one of", *(f"  {remedy}" for remedy in plan.remedies or ("another model",))]
    return "\n".join(lines)
