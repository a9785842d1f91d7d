"""The compiled module, or a clear reason why it is not there."""

from __future__ import annotations

import importlib
from types import ModuleType

from persimmon.errors import UnavailableError

_NAME = "persimmon.fast.cpu._native"
_REMEDY = "with a C++17 compiler in place, install persimmon again to build it"


def why_unavailable() -> str | None:
    """None when the engine was built, else one line that says what is missing."""
    try:
        importlib.import_module(_NAME)
    except ModuleNotFoundError:
        return f"the cpu engine was not built when persimmon was installed; {_REMEDY}"
    except ImportError as error:
        return f"the cpu engine cannot be loaded ({error}); {_REMEDY}"
    return None


def native() -> ModuleType:
    """The module; UnavailableError with the remedy when it was not built."""
    reason = why_unavailable()
    if reason is not None:
        raise UnavailableError(reason)
    return importlib.import_module(_NAME)
