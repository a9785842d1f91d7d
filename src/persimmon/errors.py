"""The errors users see. Each is a PersimmonError and the built-in exception that fits."""

from __future__ import annotations


class PersimmonError(Exception):
    """Base of every error this package raises on purpose; its text is meant for the user."""


class InputError(PersimmonError, ValueError):
    """A value the user gave is not usable; the text names it and the limit."""


class ConfigError(InputError):
    """A model configuration or recipe is wrong."""


class TokenizerError(InputError):
    """Text or ids that the tokenizer cannot take, or a tokenizer file that is not one."""


class ContextLengthError(InputError):
    """A request needs more positions than the model or the cache has."""


class CheckpointError(InputError):
    """A weight file is missing, damaged or not what its configuration says."""


class PromptFileError(InputError):
    """A prompt file is damaged, of another model, or cannot be read."""


class DataError(InputError):
    """Training or evaluation data that cannot be used; the text names file and line."""


class NotFoundError(PersimmonError, FileNotFoundError):
    """A file, directory or model that does not exist."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnavailableError(PersimmonError, RuntimeError):
    """Something this machine or installation does not have; the text says what to install."""


class StorageError(PersimmonError, OSError):
    """A file cannot be written; the text names it and says why."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
