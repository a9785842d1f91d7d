"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persimmon.errors import InputError, StorageError

CONFIG_FILE = "config.json"
PACKED_FILE = "quantization.json"
"""Marks a quantized model (fast/cpu/packed.py)."""

# What an earlier model in the same directory may have left; anything else there is somebody's and stays. The mark of
# a packed model goes first: while it stands, its tensors count and not those beside it.
_MODEL_FILES = (
    PACKED_FILE, "packed-*.safetensors",
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "checksums.json", "vocabulary_map.json", "vocabulary_dropped.safetensors",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raise InputError when `directory` holds something and nobody said that its model may be replaced."""
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise InputError(f"{directory} is not empty; choose a new directory, or --force to replace the model in it")


def check_apart(source: Path, target: Path) -> None:
    """Raise InputError when a model would be written over the one that it is read from."""
    if source.resolve() == target.resolve():
        raise InputError(f"{target} is the model itself; choose another directory")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary directory beside `directory` whose files take their place there when the block ends well.

    A new directory appears by one rename. In an existing one `config.json` goes first and comes back last: whoever
    looks in between, or after a crash, finds no model rather than a mixture of two.
    """
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a model needs a directory")
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from None
    try:
        yield partial
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, directory: Path) -> None:
    if not directory.exists():
        partial.rename(directory)
        return
    if (partial / CONFIG_FILE).exists():  # a model; an adapter takes the place of its own files alone
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for pattern in _MODEL_FILES:
            for stale in directory.glob(pattern):
                stale.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        os.replace(file, directory / file.name)
