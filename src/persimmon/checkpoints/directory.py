"""A model directory as transformers reads it: opened, checked and written. No torch.

`config.json`, `model*.safetensors` (+ index) or `pytorch_model*.bin` (+ index), the tokenizer's files,
`generation_config.json`; written by us also `checksums.json`, because safetensors files have no checksum of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.checkpoints import names, shards
from persimmon.checkpoints.checksums import write_checksums
from persimmon.checkpoints.releases import CARD_FILE
from persimmon.checkpoints.shards import DEFAULT_SHARD_BYTES, ProgressReport, no_progress
from persimmon.checkpoints.staging import CONFIG_FILE, PACKED_FILE, staged
from persimmon.checkpoints.tensors import WEIGHT_TYPES, StoredTensor, TensorData, describe
from persimmon.checkpoints.torch_files import read_torch_file
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, ConfigError, NotFoundError
from persimmon.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"

_PROBLEMS_SHOWN = 5

_READERS: dict[str, Callable[[Path], list[StoredTensor]]] = {
    shards.SINGLE_FILE: shards.read_file,
    "pytorch_model.bin": read_torch_file,
}
"""Weight files in order of preference, and what reads them."""


@dataclass(frozen=True)
class ModelDirectory:
    """A checked model directory: every tensor of the configuration is there, with its shape, and no other."""

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    """By our names, in the model's order."""

    @property
    def dtype(self) -> str:
        """The weights' element type in torch's words; `mixed` when they differ."""
        types = {WEIGHT_TYPES[tensor.dtype] for tensor in self.tensors.values()}
        return types.pop() if len(types) == 1 else "mixed"


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a model directory. A CheckpointError names the file and what is wrong in it."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise NotFoundError(f"{directory} is no model directory: it has no {CONFIG_FILE}")
    try:
        return ModelConfig.from_hub(shards.read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def open_directory(directory: Path) -> ModelDirectory:
    """Read configuration and tensor headers and hold them against each other.

    Raises NotFoundError for a missing directory or file, CheckpointError for anything that does not fit.
    """
    if not directory.is_dir():
        raise NotFoundError(f"model directory {directory} does not exist")
    config = read_config(directory)
    found = _read_tensors(directory)
    ours = check_tensors(found, config, directory)
    return ModelDirectory(directory, config, ours)


def has_weights(directory: Path) -> bool:
    """Whether every weight file that the directory should have is there; says nothing about what is in them."""
    for single in _READERS:
        index = directory / f"{single}.index.json"
        if index.is_file():
            return all((directory / part).is_file() for part in shards.read_index(index).values())
        if (directory / single).is_file():
            return True
    return False


def _read_tensors(directory: Path) -> list[StoredTensor]:
    for single, read in _READERS.items():
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _read_indexed(index, read)
        if (directory / single).is_file():
            return read(directory / single)
    if (directory / PACKED_FILE).is_file():
        raise CheckpointError(f"{directory} is quantized; use the model that it was made from")
    raise NotFoundError(f"{directory} has no weights: neither {shards.SINGLE_FILE} nor {shards.INDEX_FILE} is there")


def _read_indexed(index: Path, read: Callable[[Path], list[StoredTensor]]) -> list[StoredTensor]:
    weight_map = shards.read_index(index)
    result: list[StoredTensor] = []
    for part in sorted(set(weight_map.values())):
        file = index.parent / part
        if not file.is_file():
            raise CheckpointError(f"{index}: {part} is missing beside it")
        tensors = read(file)
        expected = {name for name, home in weight_map.items() if home == part}
        differing = sorted(expected ^ {tensor.name for tensor in tensors})
        if differing:
            raise CheckpointError(f"{file}: does not hold what {index.name} says: {_listed(differing)}")
        result += tensors
    return result


def check_tensors(
    found: Iterable[StoredTensor], config: ModelConfig, where: Path, naming: str = "hub"
) -> dict[str, StoredTensor]:
    """The tensors by our names, in the model's order.

    `naming` is the column of the name table that they follow. CheckpointError names every tensor that is missing,
    unknown or misshapen.
    """
    given = {tensor.name: tensor for tensor in found if not names.is_inverse_frequency(tensor.name)}
    if config.num_layers > len(given):
        raise CheckpointError(f"{where}: {config.num_layers} layers expected, only {len(given)} tensors found")
    problems, result = [], {}
    for parameter in names.parameters(config):
        name = getattr(parameter, naming)
        tensor = given.pop(name, None)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tensor.shape != parameter.shape:
            problems.append(f"{name} should be {list(parameter.shape)}, {tensor.file.name} has {list(tensor.shape)}")
        elif tensor.dtype not in WEIGHT_TYPES:
            problems.append(f"{name} is {tensor.dtype}; weights are {', '.join(WEIGHT_TYPES)}")
        else:
            result[parameter.ours] = tensor.rename(parameter.ours)
    problems += [f"{name} ({describe(t.dtype, t.shape)}) is no part of the model" for name, t in given.items()]
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the configuration: {_listed(problems)}")
    return result


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _PROBLEMS_SHOWN
    return "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# -- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Renamed:
    """A tensor under the name that it gets in the file."""

    name: str
    source: TensorData

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def chunks(self) -> Iterator[memoryview]:
        return self.source.chunks()


def write_directory(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorData],
    tokenizer: Tokenizer | None,
    *,
    generation: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressReport = no_progress,
) -> None:
    """Write a complete model directory; it appears whole or not at all.

    `tensors` are keyed by our names and must be exactly those of `config`. `generation`: other settings for
    `generation_config.json`. `extra` may put more files into the directory before it takes its name.
    """
    ordered = _in_order(tensors, config, directory)
    types = {WEIGHT_TYPES[tensor.dtype] for tensor in ordered}
    with staged(directory) as partial:
        digests = shards.write_checkpoint(partial, ordered, max_shard_bytes=max_shard_bytes, progress=progress)
        if tokenizer is not None:
            check_tokenizer(tokenizer, config)
            tokenizer.save(partial)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        # Generation in batches needs a padding id; the release pads with the end of text (its sampling code).
        _write_json(partial / GENERATION_FILE, {**(generation or {}), **ids, "pad_token_id": config.eos_token_id})
        _write_json(partial / CONFIG_FILE, config.to_hub(types.pop() if len(types) == 1 else "float32"))
        if extra is not None:
            extra(partial)
        write_checksums(partial, digests)


def _in_order(tensors: Mapping[str, TensorData], config: ModelConfig, where: Path) -> list[TensorData]:
    parameters = names.parameters(config)
    unknown = sorted(tensors.keys() - {parameter.ours for parameter in parameters})
    if unknown:
        raise CheckpointError(f"{where}: not written: {_listed(unknown)} is no part of the model")
    result: list[TensorData] = []
    for parameter in parameters:
        tensor = tensors.get(parameter.ours)
        if tensor is None:
            raise CheckpointError(f"{where}: not written: {parameter.ours} is missing")
        if tensor.shape != parameter.shape or tensor.dtype not in WEIGHT_TYPES:
            raise CheckpointError(
                f"{where}: not written: {parameter.ours} should be {list(parameter.shape)} of "
                f"{', '.join(WEIGHT_TYPES)}, got {describe(tensor.dtype, tensor.shape)}"
            )
        result.append(_Renamed(parameter.hub, tensor))
    return result


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise CheckpointError unless every piece has a row and the end of text is the configuration's."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model {config.vocab_size} rows")
    if tokenizer.eos_id != config.eos_token_id:
        raise CheckpointError(
            f"the tokenizer's end of text is id {tokenizer.eos_id}, config.json says {config.eos_token_id}"
        )


def _write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")


def read_generation(directory: Path) -> dict[str, Any]:
    """The settings of `generation_config.json`; empty where there is none."""
    file = directory / GENERATION_FILE
    settings = shards.read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: must hold an object")
    return settings


def copy_card(source: Path, target: Path) -> None:
    """Carry model card and licence texts over: what is derived from a model keeps its licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and (
            file.name == CARD_FILE or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        ):
            shutil.copyfile(file, target / file.name)
