"""Low-rank adapters in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`, read and written. No torch.

A matrix W [out, in] of the base gets W + scale * B A with A [rank, in] and B [out, rank]; scale is alpha / rank, or
alpha / sqrt(rank) with rank-stabilised scaling. The tensors of layer 3's fused projection are called
`base_model.model.model.layers.3.self_attn.query_key_value.lora_A.weight` and `...lora_B.weight`; that projection's
rows keep the order of the base, [heads, 3, head_dim].

An adapter whose configuration asks for anything else (DoRA, trained biases, other modules, per-module ranks) is
refused by name: running it without would be another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.checkpoints import shards
from persimmon.checkpoints.names import row
from persimmon.checkpoints.releases import by_name, write_derived_card
from persimmon.checkpoints.staging import CONFIG_FILE as MODEL_CONFIG_FILE
from persimmon.checkpoints.staging import staged
from persimmon.checkpoints.tensors import StoredTensor, TensorData, describe
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, ConfigError, InputError, NotFoundError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

TARGETS = {"query_key_value": "self_attn", "dense": "self_attn", "dense_h_to_4h": "mlp", "dense_4h_to_h": "mlp"}
"""The matrices that adapters may change, and the part of a block they are in. PEFT's `target_modules` names."""

_PREFIX = "base_model.model."
_TYPES = ("F32", "BF16", "F16")

# Keys of PEFT's configuration that say nothing about the mathematics of a trained adapter.
_IGNORED = frozenset(
    ("auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core", "qalora_group_size",
     "base_model_name_or_path", "loftq_config", "exclude_modules")
)  # fmt: skip

# Keys that may have these values alone; every other key must be empty or false.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Others (PiSSA, OLoRA ...) move part of the base's weights into the adapter.
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclass(frozen=True)
class LoraSettings:
    """The shape of an adapter."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Strength: the product B A counts alpha / rank times."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training."""
    rslora: bool = False
    """Count it alpha / sqrt(rank) times instead (Kalajdzievski 2023), so that high ranks learn as fast as low ones."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Which matrices of every block."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            wrong = f"{unknown[0]!r} is none" if unknown else f"got {list(self.targets)}"
            raise ConfigError(f"lora.targets must be different ones of {', '.join(TARGETS)}; {wrong}")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix that an adapter may change."""
    hidden, width = config.hidden_size, config.intermediate_size
    return {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (width, hidden),
        "dense_4h_to_h": (hidden, width),
    }


def count_adapter(config: ModelConfig, settings: LoraSettings) -> int:
    """Parameters of an adapter."""
    shapes = target_shapes(config)
    return config.num_layers * settings.rank * sum(sum(shapes[name]) for name in settings.targets)


def module_name(layer: int, target: str) -> str:
    """Our name of an adapted matrix, without `.weight`: `layers.3.mlp.dense_h_to_4h`."""
    return f"layers.{layer}.{TARGETS[target]}.{target}"


def tensor_name(module: str, part: str) -> str:
    """PEFT's name of a tensor; `module` as `module_name` spells it, `part` is A or B."""
    layer = module.split(".")[1]
    hub = row(f"{module}.weight".replace(f"layers.{layer}.", "layers.{}.", 1)).hub.format(layer)
    return f"{_PREFIX}{hub.removesuffix('weight')}lora_{part}.weight"


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: every tensor is there with the shape that the base needs."""

    path: Path
    settings: LoraSettings
    base: str | None
    """The base model's name or path, as the adapter says."""
    pairs: dict[str, tuple[StoredTensor, StoredTensor]]
    """A and B by `module_name`."""

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return sum(math.prod(tensor.shape) for pair in self.pairs.values() for tensor in pair)


# -- reading -------------------------------------------------------------------------------------------------


def open_adapter(directory: Path, config: ModelConfig) -> Adapter:
    """Open an adapter for models of this shape.

    Raises NotFoundError, or CheckpointError naming the setting or tensor that cannot be used.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise NotFoundError(f"{directory} is no adapter: it has no {CONFIG_FILE}")
    if not (directory / WEIGHTS_FILE).is_file():
        raise NotFoundError(f"{directory} has no {WEIGHTS_FILE}")
    document = shards.read_json(file)
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: must hold an object")
    settings, layers = _settings(file, document, config)
    found = {tensor.name: tensor for tensor in shards.read_file(directory / WEIGHTS_FILE)}
    pairs = _pairs(directory / WEIGHTS_FILE, found, settings, layers, config)
    return Adapter(directory, settings, document.get("base_model_name_or_path"), pairs)


def _settings(file: Path, document: Mapping[str, Any], config: ModelConfig) -> tuple[LoraSettings, list[int]]:
    """The shape of the adapter, and the layers that have one."""
    values = dict(document)
    try:
        rank, alpha, targets = values.pop("r"), values.pop("lora_alpha"), values.pop("target_modules")
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    dropout, rslora = values.pop("lora_dropout", 0.0), values.pop("use_rslora", False)
    layers = values.pop("layers_to_transform", None)
    for key, value in values.items():
        _check_setting(file, key, value)
    if targets == "all-linear":
        targets = list(TARGETS)
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"{file}: target_modules must be a list of names, got {targets!r}")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise CheckpointError(f"{file}: unknown target module {unknown[0]!r}; known: {', '.join(TARGETS)}")
    if type(rank) is not int or type(rslora) is not bool or type(alpha) not in (int, float):
        raise CheckpointError(f"{file}: r {rank!r}, lora_alpha {alpha!r} or use_rslora {rslora!r} has the wrong type")
    try:
        ordered = tuple(name for name in TARGETS if name in targets)
        settings = LoraSettings(rank, float(alpha), float(dropout), rslora, ordered)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return settings, _layers(file, layers, config.num_layers)


def _check_setting(file: Path, key: str, value: Any) -> None:
    if key in _IGNORED:
        return
    if key in _ALLOWED:
        if value not in _ALLOWED[key]:
            allowed = " or ".join(repr(item) for item in _ALLOWED[key])
            raise CheckpointError(f"{file}: {key} {value!r} is not supported; it must be {allowed}")
    elif value not in (None, False, {}, []):
        raise CheckpointError(f"{file}: {key} {value!r} is not supported")


def _layers(file: Path, given: Any, num_layers: int) -> list[int]:
    if given is None:
        return list(range(num_layers))
    listed = [given] if type(given) is int else given
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise CheckpointError(f"{file}: layers_to_transform must be layer numbers, got {given!r}")
    outside = [layer for layer in listed if not 0 <= layer < num_layers]
    if outside:
        raise CheckpointError(f"{file}: layer {outside[0]} is adapted, the model has layers 0 to {num_layers - 1}")
    return sorted(set(listed))


def _pairs(
    file: Path, found: dict[str, StoredTensor], settings: LoraSettings, layers: list[int], config: ModelConfig
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    shapes = target_shapes(config)
    pairs = {}
    for layer in layers:
        for target in settings.targets:
            module, (rows, columns) = module_name(layer, target), shapes[target]
            a = _take(file, found, tensor_name(module, "A"), (settings.rank, columns))
            b = _take(file, found, tensor_name(module, "B"), (rows, settings.rank))
            pairs[module] = (a, b)
    if found:
        raise CheckpointError(
            f"{file}: {next(iter(found))} belongs to no module that {CONFIG_FILE} names in this model"
        )
    return pairs


def _take(file: Path, found: dict[str, StoredTensor], name: str, shape: tuple[int, int]) -> StoredTensor:
    tensor = found.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"{file}: {name} is missing")
    if tensor.shape != shape or tensor.dtype not in _TYPES:
        raise CheckpointError(
            f"{file}: {name} is {describe(tensor.dtype, tensor.shape)}, the base model needs {list(shape)} "
            f"of {', '.join(_TYPES)}"
        )
    return tensor


# -- writing -------------------------------------------------------------------------------------------------


def write_adapter(
    directory: Path, settings: LoraSettings, tensors: Mapping[str, TensorData], base: str, base_directory: Path
) -> None:
    """Write an adapter that PEFT reads; it appears whole or not at all.

    `tensors` carry PEFT's names. `base`: the base model as the user named it; `base_directory`: where it is, for the
    licence, which the adapter inherits.
    """
    if (directory / MODEL_CONFIG_FILE).exists():
        raise InputError(f"{directory} holds a model; an adapter needs a directory of its own")
    release = by_name(base)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": release.hub_id if release else base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with staged(directory) as partial:
        shards.write_file(partial / WEIGHTS_FILE, list(tensors.values()), lambda count: None)
        (partial / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
        what = f"LoRA of rank {settings.rank}, alpha {settings.alpha:g}, on {', '.join(settings.targets)}."
        write_derived_card(partial, base, base_directory, what, library="peft")
