"""How a model is spread over processes: a mesh of data x context x tensor, by configuration alone.

* data: every process takes other rows; with `shard` (FSDP2) each keeps only its share of weights, gradients and
  optimizer states, and a block's weights are gathered just before it runs.
* context: the processes share the tokens of each row (train/attention.py); sharding runs over data x context.
* tensor: the matrices of a block are split by heads and neurons, embedding and head by pieces of the vocabulary
  (DTensor). The fused projection's rows are laid out [heads, 3, head_dim], so a split by rows is a split by heads. The
  QK LayerNorms are shared by all heads: replicated, their gradients summed over the processes.

Without `shard` and `tensor` the parameters are plain tensors and the gradients one sum over all processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from persimmon.config import ModelConfig
from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel
from persimmon.train.parallel import World


@dataclass(frozen=True)
class ParallelRecipe:
    """How the processes of a run share the work; those left over share the rows."""

    tensor: int = 1
    """Processes that split every matrix."""
    context: int = 1
    """Processes that split the tokens of every row."""
    shard: bool = False
    """Whether weights, gradients and optimizer states are split (FSDP2); always so with `tensor` above 1."""

    def __post_init__(self) -> None:
        for name in ("tensor", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def splits_weights(self) -> bool:
        """Whether parameters are DTensors."""
        return self.shard or self.tensor > 1


@dataclass(frozen=True)
class Layout:
    """This process's place in the mesh."""

    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    context_group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = field(default=None, repr=False)
    shards: DeviceMesh | None = field(default=None, repr=False)
    """data x context as one dimension: over what weights are sharded."""


def make_layout(world: World, recipe: ParallelRecipe) -> Layout:
    """The mesh of `world`'s processes; raises ConfigError when they do not divide."""
    inner = recipe.tensor * recipe.context
    if world.size % inner:
        raise ConfigError(
            f"{world.size} processes do not divide by parallel.tensor {recipe.tensor} x parallel.context "
            f"{recipe.context}"
        )
    if inner == 1 and not recipe.splits_weights:
        return Layout(world.rank, world.size)
    if world.size == 1:
        return Layout()
    shape = (world.size // inner, recipe.context, recipe.tensor)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("data", "context", "tensor"))
    shards = mesh["data", "context"]._flatten("shard")
    return Layout(
        data_rank=mesh.get_local_rank("data"), data_size=shape[0],
        context_rank=mesh.get_local_rank("context"), context_size=shape[1],
        tensor_rank=mesh.get_local_rank("tensor"), tensor_size=shape[2],
        context_group=mesh.get_group("context"), mesh=mesh, shards=shards,
    )  # fmt: skip


def check_divisible(config: ModelConfig, tensor: int) -> None:
    """Raise ConfigError unless heads, neurons and vocabulary split evenly over `tensor` processes."""
    for name in ("num_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % tensor:
            raise ConfigError(f"{name} {getattr(config, name)} is not divisible by parallel.tensor {tensor}")


def distribute(model: PersimmonModel, layout: Layout, recipe: ParallelRecipe, dtype: torch.dtype) -> None:
    """Split the parameters of `model`, which every process holds whole and equal, as the layout says, in place."""
    if layout.mesh is None or layout.shards is None or not recipe.splits_weights:
        return
    if recipe.tensor > 1:
        check_divisible(model.config, recipe.tensor)
        _split_matrices(model, layout.mesh["tensor"])
    _shard(model, layout.shards, dtype)


def _split_matrices(model: PersimmonModel, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
        "layers.*.self_attn.query_key_value": ColwiseParallel(),
        "layers.*.self_attn.dense": RowwiseParallel(),
        "layers.*.mlp.dense_h_to_4h": ColwiseParallel(),
        "layers.*.mlp.dense_4h_to_h": RowwiseParallel(),
    }
    if model.config.qk_layernorm:
        # Heads are dimension 2 of [B, T, N, D]; "sequence" is only what the style was first made for.
        for name in ("q_layernorm", "k_layernorm"):
            plan[f"layers.*.self_attn.{name}"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    parallelize_module(model, mesh, plan)


def _shard(model: PersimmonModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # On a GPU blocks are gathered and run in bfloat16, sums of gradients stay float32; on a CPU autocast does it.
    low = mesh.device_type == "cuda" and dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: the loss is scaled by all targets of the step already (and gloo knows no scaled one).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # The head's weight is used after `features`, while the root is still gathered.
    register_fsdp_forward_method(model, "features")


def reshard(model: nn.Module) -> None:
    """Free what an evaluation without a backward pass left gathered."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm over all shards is at most `limit`; returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p.grad, DTensor) for p in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    squares: dict[tuple[Any, ...], list[Tensor]] = {}
    locals_: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        key: tuple[Any, ...] = (None, ())
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            if gradient.placements != parameter.placements:  # a sum over heads still to be made
                gradient = gradient.redistribute(placements=parameter.placements)
                parameter.grad = gradient
            split = tuple(i for i, p in enumerate(gradient.placements) if not p.is_replicate())
            key, gradient = (gradient.device_mesh, split), gradient.to_local()
        assert gradient is not None
        locals_.append(gradient)
        squares.setdefault(key, []).append(gradient.float().square().sum())
    total = torch.zeros((), device=locals_[0].device)
    for (mesh, split), parts in squares.items():
        part = torch.stack(parts).sum()
        for dimension in split:
            dist.all_reduce(part, group=mesh.get_group(dimension))
        total += part
    norm = total.sqrt()
    torch._foreach_mul_(locals_, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (every process takes part), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(full: Tensor, like: DTensor) -> Tensor:
    """The part of `full` that this process holds of `like`: split by rows or columns, tensor first, then shards."""
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    part = full
    for index in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[index]
        if placement.is_replicate():
            continue
        pieces = part.chunk(like.device_mesh.size(index), dim=placement.dim)  # type: ignore[attr-defined]
        mine = coordinate[index]
        part = pieces[mine] if mine < len(pieces) else part.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return part


def gather_model(model: PersimmonModel) -> PersimmonModel:
    """A plain copy with whole parameters on the CPU, made by all processes together; a plain model itself."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    with torch.device("meta"):
        plain = PersimmonModel(model.config)
    state = {name: whole(value).detach().cpu() for name, value in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    return plain
