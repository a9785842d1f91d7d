"""Persimmon language models: run, chat with, train and examine them.

    import persimmon

    model = persimmon.load("mini")
    print(model.generate("def fib(n):", max_tokens=64, temperature=0.0).text)

Names are imported when they are first used: `import persimmon` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persimmon.api import Persimmon, load
    from persimmon.config import ModelConfig
    from persimmon.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DataError,
        InputError,
        NotFoundError,
        PersimmonError,
        PromptFileError,
        StorageError,
        TokenizerError,
        UnavailableError,
    )
    from persimmon.infer.completion import Generation, Piece
    from persimmon.infer.params import SamplingParams
    from persimmon.tokenizer import Tokenizer

    __version__: str

_HOME = {
    "persimmon.api": ("Persimmon", "load"),
    "persimmon.config": ("ModelConfig",),
    "persimmon.errors": (
        "CheckpointError", "ConfigError", "ContextLengthError", "DataError", "InputError", "NotFoundError",
        "PersimmonError", "PromptFileError", "StorageError", "TokenizerError", "UnavailableError",
    ),
    "persimmon.infer.completion": ("Generation", "Piece"),
    "persimmon.infer.params": ("SamplingParams",),
    "persimmon.tokenizer": ("Tokenizer",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "Generation",
    "InputError",
    "ModelConfig",
    "NotFoundError",
    "Persimmon",
    "PersimmonError",
    "Piece",
    "PromptFileError",
    "SamplingParams",
    "StorageError",
    "Tokenizer",
    "TokenizerError",
    "UnavailableError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version("persimmon")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'persimmon' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
