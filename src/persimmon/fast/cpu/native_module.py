"""The compiled module, or a clear reason why it is not there."""

from __future__ import annotations

from types import ModuleType

from persimmon.errors import UnavailableError

_REBUILD = "install a C++17 compiler and run `pip install --force-reinstall --no-deps persimmon` to build it"


def why_unavailable() -> str | None:
    """None when the engine was built, else one line that says what is missing."""
    try:
        from persimmon.fast.cpu import _native  # noqa: F401
    except ImportError as error:
        reason = "it was not built" if "_native" in str(error) else str(error)
        return f"the CPU engine is not available ({reason}); {_REBUILD}"
    return None


def native() -> ModuleType:
    """The module; UnavailableError with the remedy when it was not built."""
    reason = why_unavailable()
    if reason is not None:
        raise UnavailableError(reason)
    from persimmon.fast.cpu import _native

    return _native
